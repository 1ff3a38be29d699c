"""What a bundle weighs and how fast its graphs are, against every net exported by itself; ratios, side by side.

    python benchmarks/export.py                                        # a table; networks with random weights
    python benchmarks/export.py --preset resnet18-34-50-basic --json
    python benchmarks/export.py --run runs/first                       # the networks and images of a finished run

"Plain" is what `torch.onnx.export` writes of one net: one file, batch norms folded. All graphs are run by onnxruntime,
one image at a time (but where it says 32) on one thread, in turns, so that a change of the machine's speed meets them
all; a ratio is the median of those of the turns. Let nothing else run meanwhile.

size                the bundle / the plain full-net; all files, the manifest too
int8_size           the int8 bundle / the plain full-net
int8_integers       int8 weights stored / weights of the full-net: 1 where all depths share one set
difference          largest difference of a logit to the eager network / largest logit, on one image
speed               time of the bundle's graph / time of the plain one
int8_speedup        time of the bundle's graph / time of its int8 twin
int8_speedup_of_32  the same, 32 images at a time: operators that only start and end weigh less
cascade             time of a net's part of the cascade / time of its whole graph
cascade_macs        the same in MACs
lost                percentage points of top-1 that int8 costs (of a run only: random networks see nothing)
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ddnn.checkpoint import RunFolder
from ddnn.evaluate import ratio
from ddnn.export import About, Int8, export_bundle, export_run
from ddnn.families import build
from ddnn.network import DDNN, nest
from ddnn.runtime.machine import this_machine
from ddnn.timing import in_turns
from ddnn.trained import load_trained

CASES = {"cifar-resnet8-14-20": (32, 100), "resnet18-34-50-basic": (224, 1000)}
"""Preset: pixels, classes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=CASES, action="append", help="only these")
    parser.add_argument("--run", type=Path, help="a finished run instead")
    parser.add_argument("--folder", type=Path, help="keep what is exported here, and take what is here already")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring per net")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = {}
    for name in [str(arguments.run)] if arguments.run else (arguments.preset or CASES):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)) / name.replace("/", "_")
            net, size = (of_run if arguments.run else of_preset)(name, folder)
            results[name] = measure(net, size, folder, arguments.seconds)
    if arguments.json:
        print(json.dumps({**results, "machine": {"threads": 1, **asdict(this_machine())}}, indent=2))
        return
    for name, result in results.items():
        Console(width=120).print(table(name, result))


def of_preset(name: str, folder: Path) -> tuple[DDNN, int]:
    """Write both bundles of a preset with random weights, whose norms are as after some training."""
    size, classes = CASES[name]
    torch.manual_seed(0)
    full_net, depths = build(name, classes)
    net = nest(full_net, depths).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, least, most in (
                (module.weight, 0.3, 0.7),
                (module.bias, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, least, most)
    about = About([f"class {i}" for i in range(classes)], (0.5,) * 3, (0.25,) * 3)
    x = torch.randn(32, 3, size, size)
    labels = torch.zeros(8, dtype=torch.int64)
    if not (folder / "float32").exists():
        export_bundle(net, folder / "float32", x[:8], about)
    if not (folder / "int8").exists():
        export_bundle(net, folder / "int8", x[:8], about, Int8(x, lambda: [(x[:8], labels)], allowed_loss=100))
    return net, size


def of_run(name: str, folder: Path) -> tuple[DDNN, int]:
    """Write both bundles of a finished run."""
    run = RunFolder.open(Path(name))
    net, about = load_trained(run)
    if not (folder / "float32").exists():
        export_run(run, folder / "float32")
    if not (folder / "int8").exists():
        export_run(run, folder / "int8", int8=True, allowed_loss=100)
    return net, about["data"]["image_size"]


def measure(net: DDNN, size: int, folder: Path, seconds: float) -> dict[str, Any]:
    """All figures of one DDNN whose bundles are in `float32` and `int8`."""
    for name, sub in net.nets.items():
        if (folder / f"{name}.onnx").exists():
            continue
        torch.onnx.export(
            sub,
            (torch.randn(2, 3, size, size),),
            folder / f"{name}.onnx",
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            external_data=False,
            verbose=False,
        )
    alone = (folder / f"{net.full_name}.onnx").stat().st_size
    manifests = {kind: json.loads((folder / kind / "manifest.json").read_text()) for kind in ("float32", "int8")}
    random = "dataset" not in manifests["float32"]["source"]
    weights = sum(p.numel() for p in net.nets[net.full_name].parameters() if p.ndim > 1)
    return {
        "size": weigh(folder / "float32") / alone,
        "int8_size": weigh(folder / "int8") / alone,
        "int8_integers": integers(folder / "int8") / weights,
        "nets": {name: net_figures(net, name, folder, manifests, size, seconds, random) for name in net.depths},
    }


def net_figures(
    net: DDNN, name: str, folder: Path, manifests: Mapping[str, Any], size: int, seconds: float, random: bool
) -> dict[str, float | None]:
    x = torch.randn(1, 3, size, size)
    entry = next(entry for entry in manifests["float32"]["nets"] if entry["name"] == name)
    sessions = {
        "plain": session(folder / f"{name}.onnx"),
        "bundle": session(folder / "float32" / entry["graph"]),
        "int8": session(folder / "int8" / entry["graph"]),
    }
    calls = {kind: partial(each.run, None, {"images": x.numpy()}) for kind, each in sessions.items()}
    with torch.no_grad():
        expected = net.nets[name](x).numpy()
    difference = np.abs(sessions["bundle"].run(["logits"], {"images": x.numpy()})[0] - expected).max()
    part = session(folder / "float32" / entry["cascade"]["graph"])
    (given,) = part.get_inputs()
    shape = [1, *given.shape[1:]]
    calls["part"] = partial(part.run, None, {given.name: np.random.default_rng(0).random(shape, dtype=np.float32)})
    times = turns(calls, seconds)
    images = torch.randn(32, 3, size, size).numpy()
    of_32 = turns({kind: partial(sessions[kind].run, None, {"images": images}) for kind in ("bundle", "int8")}, seconds)
    tried = manifests["int8"]["int8"]["nets"][name]
    return {
        "difference": float(difference / np.abs(expected).max()),
        "speed": ratio(times, ["bundle"], ["plain"]),
        "int8_speedup": ratio(times, ["bundle"], ["int8"]),
        "int8_speedup_of_32": ratio(of_32, ["bundle"], ["int8"]),
        "cascade": ratio(times, ["part"], ["bundle"]),
        "cascade_macs": entry["cascade"]["macs"] / entry["macs"],
        "lost": None if random else 100 * (tried["before"]["top1"] - tried["after"]["top1"]),
    }


def session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in turns, for as long as that."""
    return in_turns(calls, seconds=seconds, fewest=5, most=10**6, warmup=5)


def weigh(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def integers(folder: Path) -> int:
    """Bytes of the int8 weights of all graphs, each place in the file counted once."""
    places = {}
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
                about = {entry.key: entry.value for entry in tensor.external_data}
                places[about["offset"]] = int(about["length"])
    return sum(places.values())


def table(name: str, result: Mapping[str, Any]) -> Table:
    figures = ", ".join(f"{key} {result[key]:.4f}" for key in ("size", "int8_size", "int8_integers"))
    out = Table(title=f"{name}: {figures}", title_justify="left")
    columns = list(next(iter(result["nets"].values())))
    for column in ("sub-net", *columns):
        out.add_column(column, justify="left" if column == "sub-net" else "right")
    for net, row in result["nets"].items():
        out.add_row(
            net, *("" if v is None else f"{v:.1e}" if c == "difference" else f"{v:.3f}" for c, v in row.items())
        )
    return out


if __name__ == "__main__":
    main()
