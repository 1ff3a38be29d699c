"""Where the time of a joint EKD step goes, against what this machine can do.

    python benchmarks/roofline.py [--preset cifar-resnet8-14-20] [--precision bf16] [--json]

The ceilings are measured here: a large matrix product, and every distinct convolution of the step by itself, forward
and backward, the way the step makes it, again and again on the same tensors. A step that did nothing but its
convolutions at that speed would take `convolutions_alone_s`. `tree_bound_in_time` is that over the same sum for the
nets apart: what sharing leaves of the time, as `tree_bound` is what it leaves of the MACs. The rest of the table says
what the step really spends its time on, by kind of operator, from torch's profiler. Let nothing else run meanwhile.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step import CASES, add_precision, machine, precision_of, set_up, stepping, warm_up
from torch import Tensor, nn

from ddnn.autocast import autocast
from ddnn.device import has_bf16, keep_freed_memory
from ddnn.evaluate import macs, side_by_side, tree_bound
from ddnn.network import DDNN
from ddnn.objective import EKD

KINDS = {
    "convolution backward": ("convolution_backward",),
    "convolution forward": ("mkldnn_convolution", "cudnn_convolution", "aten::_slow_conv", "thnn_conv"),
    "batch norm": ("batch_norm",),
    "convolutions as matrix products, classifier": ("aten::mm", "aten::addmm", "aten::flip", "constant_pad"),
    "optimiser": ("_fused_sgd", "_fused_adam", "Optimizer."),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::fill_", "aten::zero_"),
    "activations, residual sums and their gradients": ("clamp_min", "threshold", "aten::add", "relu"),
    "attention maps": ("vector_norm", "aten::mul", "addcmul"),
    "losses": (
        "softmax",
        "kl_div",
        "nll",
        "aten::exp",
        "aten::sub",
        "aten::sum",
        "aten::mean",
        "aten::pow",
        "aten::div",
    ),
}
"""Kinds of operator by what their names contain; the first that fits counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=CASES, default="cifar-resnet8-14-20")
    add_precision(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_of(arguments, device)
    keep_freed_memory()
    found = measure(arguments.preset, device, precision == "bf16")
    if arguments.json:
        print(json.dumps(found | {"machine": machine(device, precision)}, indent=2))
    else:
        show(found)


def measure(preset: str, device: torch.device, bf16: bool) -> dict[str, Any]:
    case = CASES[preset]
    net, x, target = set_up(preset, device)
    objective = EKD()

    def backward(of: DDNN) -> None:
        with autocast(of, device, bf16):
            outputs = of(x, energies=True)
        torch.stack(list(objective(outputs, target).values())).sum().backward()

    step = stepping(net, backward)
    warm_up([step])
    seconds = median_seconds(step, device)
    operations = 2 * 3 * macs(net, case.size) * case.batch
    calls = convolutions_of(net, x)
    found = {one: by_itself(one, net, device, bf16) for one in calls}
    alone = sum(count * found[one]["seconds"] for one, count in calls.items())
    apart = sum(
        count * found[one]["seconds"] for sub in net.nets.values() for one, count in convolutions_of(sub, x).items()
    )
    return {
        "preset": preset,
        "batch": case.batch,
        "step_s": seconds,
        "step_operations": operations,
        "step_flops": operations / seconds,
        "matrix_product_flops": {
            str(dtype).removeprefix("torch."): matrix_product(dtype, device)
            for dtype in ((torch.float32, torch.bfloat16) if has_bf16(device) else (torch.float32,))
        },
        "convolutions_alone_s": alone,
        "share_of_convolution_ceiling": alone / seconds,
        "tree_bound": tree_bound(net, case.size),
        "tree_bound_in_time": alone / apart,
        "convolutions": [
            {"input": list(one[0][1:]), "weight": list(one[1]), "stride": one[2][0], "calls": count, **found[one]}
            for one, count in calls.items()
        ],
        "shares": shares(step),
    }


def median_seconds(call: Callable[[], object], device: torch.device, budget_s: float = 4.0) -> float:
    return statistics.median(side_by_side({"call": call}, device, budget_s)["call"])


def matrix_product(dtype: torch.dtype, device: torch.device, n: int = 2048) -> float:
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / median_seconds(lambda: a @ b, device, budget_s=1.5)


Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Shapes of input and weight, stride, padding, groups."""


def convolutions_of(net: nn.Module, x: Tensor) -> Counter[Convolution]:
    """How often each distinct convolution runs in a forward."""
    calls: Counter[Convolution] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert not isinstance(module.padding, str)
        calls[tuple(inputs[0].shape), tuple(module.weight.shape), module.stride, module.padding, module.groups] += 1

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return calls


def by_itself(convolution: Convolution, net: nn.Module, device: torch.device, bf16: bool) -> dict[str, float]:
    """Seconds forward and backward, as the net makes it, again and again on the same tensors; and the speeds."""
    shape, weight_shape, stride, padding, groups = convolution
    image, weight = (
        torch.randn(s, device=device)
        .to(torch.bfloat16 if bf16 else torch.float32)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for s in (shape, weight_shape)
    )
    wants_image = shape[1] != 3  # nothing needs the gradient of the images
    wanted = [image, weight] if wants_image else [weight]

    def forward() -> Tensor:
        return torch.conv2d(image, weight, None, stride, padding, 1, groups)

    with autocast(net, device, bf16):
        output = forward()
        gradient = torch.randn_like(output)
        ahead = median_seconds(forward, device, 0.15)
    back = median_seconds(lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True), device, 0.15)
    operations = 2 * output.numel() * weight[0].numel()
    return {
        "seconds": ahead + back,
        "forward_flops": operations / ahead,
        "backward_flops": (2 if wants_image else 1) * operations / back,
    }


def shares(step: Callable[[], object], steps: int = 5) -> dict[str, float]:
    """Share of each kind of operator in the time of a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
    spent: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        spent[kind] += event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
    return {kind: time / spent.total() for kind, time in spent.most_common()}


def show(found: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(title=f"a joint EKD step of {found['preset']}, batch {found['batch']}")
    table.add_column("what")
    table.add_column("is", justify="right")
    giga = 1e9
    table.add_row("step", f"{1000 * found['step_s']:.1f} ms")
    table.add_row("operations of a step (2 x MACs, backward twice forward)", f"{found['step_operations'] / giga:.1f} G")
    table.add_row("speed reached", f"{found['step_flops'] / giga:.0f} G/s")
    for name, flops in found["matrix_product_flops"].items():
        table.add_row(f"ceiling: matrix product, {name}", f"{flops / giga:.0f} G/s")
    table.add_row("ceiling: its convolutions by themselves", f"{1000 * found['convolutions_alone_s']:.1f} ms")
    table.add_row("share of that ceiling reached", f"{found['share_of_convolution_ceiling']:.2f}")
    table.add_row("tree / nets apart, by MACs", f"{found['tree_bound']:.3f}")
    table.add_row("tree / nets apart, by the time of convolutions by themselves", f"{found['tree_bound_in_time']:.3f}")
    console.print(table)
    kinds = Table(title="where the time goes")
    kinds.add_column("kind of operator")
    kinds.add_column("share", justify="right")
    for kind, share in found["shares"].items():
        kinds.add_row(kind, f"{share:.1%}")
    console.print(kinds)
    each = Table(title="convolutions by themselves")
    for head in ("input", "weight", "stride", "calls", "forward G/s", "backward G/s"):
        each.add_column(head, justify="right")
    for row in found["convolutions"]:
        flops = [f"{row[key] / giga:.0f}" for key in ("forward_flops", "backward_flops")]
        each.add_row(str(row["input"]), str(row["weight"]), str(row["stride"]), str(row["calls"]), *flops)
    console.print(each)


if __name__ == "__main__":
    main()
