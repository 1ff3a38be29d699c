"""What a joint training step costs, as ratios measured side by side in one run.

    python benchmarks/step.py                              # a table, all presets
    python benchmarks/step.py --preset cifar-resnet8-14-20 --json

Every step is forward, objective, backward and optimiser, in turns with the others; each figure is the median over
rounds of the ratio in a round, so that a change of the machine's speed cancels. Let nothing else run meanwhile.

joint_over_alone    joint EKD step / sum of the steps of the same networks trained alone
tree_bound          MACs of the tree / MACs of the networks alone: what joint_over_alone could be at best
ekd_over_joint      EKD step / joint step with cross-entropy only
joint_over_loop     joint step / plain loop of forwards and backwards over the same tied networks, cross-entropy only
loop_bound          MACs of the tree / MACs of that loop
lean_memory         peak memory of the lean EKD step / that of a step of the full-net alone: parameters, gradients,
                    optimiser state and everything allocated during the step
lean_time           lean EKD step / plain EKD step
subnet_over_library extracted sub-nets / the library's own networks, eager inference, batch 1, geometric mean
compiled_over_eager joint EKD step as `train.compile` has it / without, after warm-up
compiled_ekd_over_joint
                    the same step / joint step with cross-entropy only, compiled as well; with --compile-both only
recompiles          compilations after warm-up

The first time on a machine, compiling takes 45 s for the first preset, 70 s and 3.5 minutes for the others; later a
seventh of that.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddnn.autocast import autocast
from ddnn.branchwise import branchwise_backward
from ddnn.compiling import check_compiler, compiled
from ddnn.device import has_bf16, keep_freed_memory, use_huge_pages
from ddnn.errors import RunError
from ddnn.evaluate import ratio, side_by_side, tree_bound
from ddnn.families import PRESETS, build
from ddnn.families.cifar_resnet import resnet as cifar_resnet
from ddnn.network import DDNN, Output, nest
from ddnn.objective import EKD
from ddnn.optimizer import make_optimizer
from ddnn.recipe import Optim

CLASSES = 100


@dataclass(frozen=True)
class Case:
    size: int
    batch: int
    seconds: float
    """To measure all steps for, and then half of it the two whose difference is small: some ten rounds on two cores
    with AVX-512. `ROUNDS` are taken in any case."""


CASES = {
    "cifar-resnet8-14-20": Case(size=32, batch=128, seconds=15),
    "resnet18-34-50-basic": Case(size=64, batch=32, seconds=60),
    "resnet50-101-152": Case(size=64, batch=16, seconds=90),
}


ROUNDS = 8
"""Of all steps, and as many again of those two: a shared machine moves a single round's ratio by a twentieth."""


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line, or those given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(compiling=("ekd",))
    parser.add_argument("--preset", choices=CASES, help="one of them alone")
    add_precision(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        help="to measure each preset for, and half of it again (default: 15, 60 and 90, as in the order above; "
        f"longer where that is less than {ROUNDS} rounds)",
    )
    compiling = parser.add_mutually_exclusive_group()
    compiling.add_argument(
        "--no-compile",
        dest="compiling",
        action="store_const",
        const=(),
        help="leave out the compiled steps: compiling takes minutes",
    )
    compiling.add_argument(
        "--compile-both",
        dest="compiling",
        action="store_const",
        const=("ekd", "joint"),
        help="compile the joint step with cross-entropy only, too",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(given)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option `--precision`, whose value `precision_of` gives."""
    parser.add_argument(
        "--precision",
        choices=("bf16", "float32"),
        help="(default: bf16, or float32 on a CPU without instructions for it)",
    )


def precision_of(arguments: argparse.Namespace, device: torch.device) -> str:
    """What is asked for, else what is fast there."""
    asked: str | None = arguments.precision
    return asked or ("bf16" if has_bf16(device) else "float32")


def main() -> None:
    arguments = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_of(arguments, device)
    if arguments.compiling:
        try:
            check_compiler(device)
        except RunError:
            sys.exit("error: the compiled steps need a C++ compiler; install g++, or leave them out with --no-compile")
    keep_freed_memory()
    results = {
        name: measure(
            name,
            device,
            precision == "bf16",
            CASES[name].seconds if arguments.seconds is None else arguments.seconds,
            arguments.compiling,
        )
        for name in ([arguments.preset] if arguments.preset else CASES)
    }
    where = machine(device, precision)
    if arguments.json:
        print(json.dumps({"presets": results, "machine": where}, indent=2))
        return
    table = Table(title=", ".join(f"{key} {value}" for key, value in where.items()))
    table.add_column("figure")
    for name in results:
        table.add_column(name, justify="right")
    for figure in next(iter(results.values())):
        table.add_row(figure, *("-" if row[figure] is None else f"{row[figure]:.3f}" for row in results.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def machine(device: torch.device, precision: str) -> dict[str, str | int]:
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
    }


def stepping(of: DDNN, backward: Callable[[DDNN], None]) -> Callable[[], None]:
    """A whole training step: `backward`, then the optimiser."""
    optimizer = make_optimizer(of, Optim(lr=1e-4))

    def step() -> None:
        backward(of)
        optimizer.step()
        optimizer.zero_grad()

    return step


def warm_up(calls: Iterable[Callable[[], object]]) -> None:
    """Run each once; the heap is then as large as it gets, and all of them have huge pages alike."""
    for call in calls:
        call()
    use_huge_pages()


def set_up(preset: str, device: torch.device) -> tuple[DDNN, Tensor, Tensor]:
    """The preset's DDNN with fresh weights, and images and classes of its case."""
    case = CASES[preset]
    torch.manual_seed(0)
    full_net, table = build(preset, CLASSES)
    net = nest(full_net, table).to(device, memory_format=torch.channels_last).train()
    x = torch.randn(case.batch, 3, case.size, case.size, device=device).to(memory_format=torch.channels_last)
    return net, x, torch.randint(CLASSES, (case.batch,), device=device)


def measure(
    preset: str, device: torch.device, bf16: bool, seconds: float, compiling: Collection[str]
) -> dict[str, float | None]:
    case = CASES[preset]
    net, x, target = set_up(preset, device)
    ekd, joint = EKD(), EKD(kl=0.0, attention=0.0)

    halved = partial(autocast, net, device, bf16)

    def plain(objective: EKD, forward: Callable[..., dict[str, Output]] | None = None) -> Callable[[DDNN], None]:
        def backward(of: DDNN) -> None:
            with halved():
                outputs = (of if forward is None else forward)(x, energies=objective.attends(of.depths))
            torch.stack(list(objective(outputs, target).values())).sum().backward()

        return backward

    def loop(of: DDNN) -> None:
        for one in of.nets.values():
            with halved():
                logits = one(x)
            nn.functional.cross_entropy(logits.float(), target).backward()

    def lean(of: DDNN) -> None:
        branchwise_backward(of, ekd, x, target, autocast=halved)

    alone = {name: nest(net.subnet(name), {}, full_name=name).train() for name in net.depths}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    calls = {
        "ekd": stepping(copy.deepcopy(net), plain(ekd)),
        "joint": stepping(copy.deepcopy(net), plain(joint)),
        "loop": stepping(copy.deepcopy(net), loop),
        "lean": stepping(copy.deepcopy(net), lean),
        **{f"alone {name}": stepping(one, plain(ekd)) for name, one in alone.items()},
    }
    objectives = {"ekd": ekd, "joint": joint}
    for name in compiling:
        own = copy.deepcopy(net)
        calls[f"compiled {name}"] = step = stepping(own, plain(objectives[name], compiled(own, device)))
        for _ in range(3):
            step()
    warm_up(calls.values())
    before = counters["stats"]["unique_graphs"]
    times = side_by_side(calls, device, seconds, warmup=0, least=ROUNDS)
    pair = {name: calls[name] for name in ("ekd", "joint")}
    again = side_by_side(pair, device, seconds / 2, warmup=0, least=ROUNDS)
    close = {name: times[name] + again[name] for name in pair}
    tree = tree_bound(net, case.size)
    return {
        "joint_over_alone": ratio(times, ["ekd"], [name for name in times if name.startswith("alone ")]),
        "tree_bound": tree,
        "ekd_over_joint": ratio(close, ["ekd"], ["joint"]),
        "joint_over_loop": ratio(times, ["joint"], ["loop"]),
        "loop_bound": tree,
        "lean_memory": peak_bytes(net, calls["lean"], device)
        / peak_bytes(alone[net.full_name], calls[f"alone {net.full_name}"], device),
        "lean_time": ratio(times, ["lean"], ["ekd"]),
        "subnet_over_library": subnet_over_library(preset, net, case.size, device),
        "compiled_over_eager": ratio(times, ["compiled ekd"], ["ekd"]) if compiling else None,
        "compiled_ekd_over_joint": ratio(times, ["compiled ekd"], ["compiled joint"]) if "joint" in compiling else None,
        "recompiles": counters["stats"]["unique_graphs"] - before if compiling else None,
    }


def peak_bytes(of: DDNN, step: Callable[[], None], device: torch.device) -> int:
    """Most bytes held in a step: what stays (parameters, momentum, buffers) and what the step allocates on top."""
    stays = 2 * sum(p.numel() * p.element_size() for p in of.parameters())
    stays += sum(b.numel() * b.element_size() for b in of.buffers())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return stays + torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return stays + peak


def subnet_over_library(preset: str, net: DDNN, size: int, device: torch.device) -> float:
    """Batch-1 inference of each extracted sub-net against the library's own network; 1 means no price."""
    x = torch.randn(1, 3, size, size, device=device)

    def call(one: nn.Module) -> Callable[[], object]:
        return lambda: one(x)

    ratios = []
    for name in net.depths:
        pair = {
            "ours": call(net.subnet(name).to(device, memory_format=torch.channels_last).eval()),
            "library": call(library(preset, name).to(device, memory_format=torch.channels_last).eval()),
        }
        with torch.inference_mode():
            ratios.append(ratio(side_by_side(pair, device, budget_s=4.0), ["ours"], ["library"]))
    return statistics.geometric_mean(ratios)


def library(preset: str, name: str) -> nn.Module:
    """The library's own network of that name; where it has none, the same class built to these depths."""
    if preset.startswith("cifar"):
        return cifar_resnet(int(name.removeprefix("resnet")), num_classes=CLASSES)
    if hasattr(torchvision.models, name):
        one: nn.Module = getattr(torchvision.models, name)(num_classes=CLASSES)
        return one
    return build(f"torchvision/{name}", CLASSES)[0]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    assert set(CASES) <= set(PRESETS)
    main()
