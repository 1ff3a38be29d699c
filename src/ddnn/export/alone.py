"""Each sub-net alone, as a file of its own in the format of one of today's runtimes.

Every file is read back by its runtime and has to compute what the network computes on real images, or none is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ddnn.errors import ExportError
from ddnn.export import manifest as manifests
from ddnn.export.graph import cut, fold_norms, trace
from ddnn.export.manifest import About
from ddnn.export.parity import Array, compare, eager_logits, run
from ddnn.export.quiet import quiet
from ddnn.extras import advice
from ddnn.files import new_folder
from ddnn.network import DDNN


@dataclass(frozen=True)
class Format:
    """How to write a network in eval mode for images like [2, 3, S, S], and how to run what was written."""

    suffix: str
    package: str
    """What has to be installed."""
    write: Callable[[nn.Module, Tensor, Path], None]
    run: Callable[[Path, Tensor], Array]
    """The logits [N, classes] of images [N, 3, S, S]."""


def export_alone(
    net: DDNN, out: Path, images: Tensor, about: About, kind: str, subnets: Sequence[str] = ()
) -> dict[str, Any]:
    """Write every net, or those of `subnets`, as `NAME.suffix` in the folder `out`, with a manifest, and return that.

    `net` is on the CPU and in eval mode; `images`: real ones, normalised, float32 [N, 3, S, S], at least two.

    Raises `ExportError` where `out` exists, a name is unknown, the net was never calibrated, or a file differs from the
    network.
    """
    form, size = format_of(kind), images.shape[-1]
    unknown = [name for name in subnets if name not in net.depths]
    if unknown:
        raise ExportError(f"no net {unknown[0]!r} in this run; it has {', '.join(net.depths)}")
    about = manifests.check(net, about, images)
    names = [name for name in net.depths if name in subnets or not subnets]
    expected = eager_logits(net, images)
    entries = []
    with new_folder(out) as folder, quiet():
        for name in names:
            path = folder / f"{name}{form.suffix}"
            form.write(net.subnet(name).to(memory_format=torch.contiguous_format).eval(), images[:2], path)
            parity = compare(f"{kind} of {name}", expected[name], form.run(path, images))
            entries.append(manifests.entry(net, name, path.name, about, size) | {"parity": parity})
        manifest = manifests.describe(f"ddnn-{kind}", net, entries, about, size)
        manifests.write(folder, manifest)
    return manifest


def format_of(kind: str) -> Format:
    """The format of that name; `ExportError` if there is none, or what it needs is not installed."""
    if kind not in FORMATS:
        raise ExportError(f"no format {kind!r}; there are: bundle, {', '.join(FORMATS)}")
    try:
        import_module(FORMATS[kind].package)
    except ModuleNotFoundError as error:
        raise ExportError(f"format {kind}: {advice(error)}") from None
    return FORMATS[kind]


def _write_onnx(net: nn.Module, images: Tensor, path: Path) -> None:
    model = cut(trace(net, images, ["logits"]), ["images"], ["logits"])
    fold_norms(model)
    ir.save(model, path)


def _run_onnx(path: Path, images: Tensor) -> Array:
    return run(path, {"images": images.numpy()})["logits"]


def _write_torch(net: nn.Module, images: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("N")},)), path)


def _run_torch(path: Path, images: Tensor) -> Array:
    with torch.no_grad():
        logits: Array = torch.export.load(path).module()(images).numpy()
    return logits


def _write_executorch(net: nn.Module, images: Tensor, path: Path) -> None:
    """For one image at a time, as it is used on devices; XNNPACK does the work."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(torch.export.export(net, (images[:1],)), partitioner=[XnnpackPartitioner()])
    path.write_bytes(program.to_executorch().buffer)


def _run_executorch(path: Path, images: Tensor) -> Array:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)  # has to outlive its method
    method = program.load_method("forward")
    logits: Array = torch.cat([method.execute([image])[0].clone() for image in images.split(1)]).numpy()
    return logits


def _write_openvino(net: nn.Module, images: Tensor, path: Path) -> None:
    """In float32; OpenVINO would halve the weights by default."""
    import openvino

    source = path.with_suffix(".onnx")
    _write_onnx(net, images, source)
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)
    source.unlink()


def _run_openvino(path: Path, images: Tensor) -> Array:
    """In float32 too: on processors that can, OpenVINO computes in bfloat16 if nothing is said."""
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits: Array = compiled(images.numpy())[0]
    return logits


FORMATS: Mapping[str, Format] = {
    "onnx": Format(".onnx", "onnx", _write_onnx, _run_onnx),
    "torch-export": Format(".pt2", "torch", _write_torch, _run_torch),
    "executorch": Format(".pte", "executorch", _write_executorch, _run_executorch),
    "openvino": Format(".xml", "openvino", _write_openvino, _run_openvino),
}
"""By the name that `ddnn export --format` takes."""
