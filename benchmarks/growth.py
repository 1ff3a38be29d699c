"""How the cost of a joint EKD step grows: with the number of sub-nets, with depth, and with the batch.

    python benchmarks/growth.py --out results/speed      # growth.json, growth.png, growth.svg

Times are medians of steps taken in turns with steps of the full-net alone, and shown as a multiple of these; memory is
the most that is held in a step, as a multiple of the full-net's. The bound is what the MACs of the tree of paths leave.
Let nothing else run meanwhile.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from step import add_precision, machine, peak_bytes, precision_of, stepping, warm_up

from ddnn.autocast import autocast
from ddnn.branchwise import branchwise_backward
from ddnn.device import keep_freed_memory
from ddnn.evaluate import macs, parameters, side_by_side
from ddnn.families.cifar_resnet import resnet
from ddnn.figure import SETTINGS, new_figure
from ddnn.network import DDNN, nest
from ddnn.objective import EKD

Depths = tuple[int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_precision(parser)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each point (default: 4)")
    parser.add_argument("--out", type=Path, help="folder for growth.json and the figure; else JSON is printed")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_of(arguments, device)
    keep_freed_memory()

    def point(x: float, layers: int, subnets: list[Depths], batch: int) -> dict[str, float]:
        return {"x": x, **measure(layers, subnets, batch, device, precision == "bf16", arguments.seconds)}

    nested: list[Depths] = [(n, n, n) for n in range(1, 9)]
    found = {
        "machine": machine(device, precision),
        "panels": {
            "number of sub-nets in ResNet-56": [point(k, 56, nested[-k:], 64) for k in range(1, 9)],
            "layers of the full-net, one sub-net of half its blocks": [
                point(n, n, [((n - 2) // 12,) * 3], 64)
                for n in (20, 32, 44, 56, 110)  # type: ignore[list-item]
            ],
            "images in a batch, ResNet-8/14/20": [point(n, 20, nested[:2], n) for n in (8, 16, 32, 64, 128, 256)],
        },
    }
    text = json.dumps(found, indent=2)
    if arguments.out is None:
        print(text)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "growth.json").write_text(text + "\n")
    draw(found, arguments.out)


def measure(
    layers: int, subnets: list[Depths], batch: int, device: torch.device, bf16: bool, seconds: float
) -> dict[str, float]:
    torch.manual_seed(0)
    net = nest(resnet(layers, num_classes=100), {f"net{d[0]}": d for d in subnets})
    net = net.to(device, memory_format=torch.channels_last).train()
    alone = nest(net.subnet(net.full_name), {}).train()
    x = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(100, (batch,), device=device)
    objective = EKD()
    halved = partial(autocast, net, device, bf16)

    def plain(of: DDNN) -> None:
        with halved():
            outputs = of(x, energies=objective.attends(of.depths))
        torch.stack(list(objective(outputs, target).values())).sum().backward()

    def lean(of: DDNN) -> None:
        branchwise_backward(of, objective, x, target, autocast=halved)

    calls = {"plain": stepping(net, plain), "lean": stepping(net, lean), "alone": stepping(alone, plain)}
    warm_up(calls.values())
    times = {name: statistics.median(t) for name, t in side_by_side(calls, device, seconds).items()}
    memory = {name: peak_bytes(alone if name == "alone" else net, call, device) / 2**20 for name, call in calls.items()}
    return {
        "time": times["plain"] / times["alone"],
        "time_lean": times["lean"] / times["alone"],
        "time_bound": macs(net, 32) / macs(net.nets[net.full_name], 32),
        "time_alone_each": sum(macs(one, 32) for one in net.nets.values()) / macs(net.nets[net.full_name], 32),
        "memory": memory["plain"] / memory["alone"],
        "memory_lean": memory["lean"] / memory["alone"],
        "images_per_second": batch / times["plain"],
        "parameters": parameters(net) / parameters(alone),
    }


def draw(found: dict[str, Any], out: Path) -> None:
    """Three columns, time above memory; the bound dashed."""
    with matplotlib.rc_context(SETTINGS):
        panels: dict[str, list[dict[str, float]]] = found["panels"]
        figure = new_figure(11, 6.2)
        axes = figure.subplots(2, len(panels), sharey="row", squeeze=False)
        lines = {
            0: [
                ("time", "joint EKD step", "#0072B2", "-", "o"),
                ("time_lean", "lean joint EKD step", "#D55E00", "-", "s"),
                ("time_bound", "bound: MACs of the tree", "black", "--", ""),
                ("time_alone_each", "MACs of training each alone", "#777777", ":", ""),
            ],
            1: [
                ("memory", "joint EKD step", "#0072B2", "-", "o"),
                ("memory_lean", "lean joint EKD step", "#D55E00", "-", "s"),
            ],
        }
        for column, (title, points) in enumerate(panels.items()):
            for row, what in lines.items():
                panel = axes[row, column]
                for key, label, colour, dash, marker in what:
                    panel.plot(
                        [p["x"] for p in points],
                        [p[key] for p in points],
                        dash,
                        marker=marker,
                        color=colour,
                        label=label,
                        markersize=4,
                    )
                if title.startswith("images"):
                    panel.set_xscale("log", base=2)
                    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                if row:
                    panel.axhline(1, color="black", linestyle="--", linewidth=1.2, label="bound: the full-net alone")
                    panel.set_xlabel(title)
                panel.set_ylim(bottom=0)
                panel.grid(axis="y", alpha=0.3)
        axes[0, 0].set_ylabel("time ÷ full-net alone")
        axes[1, 0].set_ylabel("peak memory ÷ full-net alone")
        axes[0, -1].legend(frameon=False, fontsize=8)
        axes[1, -1].legend(frameon=False, fontsize=8)
        where = found["machine"]
        figure.suptitle(
            f"Cost of a joint EKD step ({where['processor']}, {where['threads']} threads, {where['precision']})"
        )
        for ending in ("png", "svg"):
            figure.savefig(out / f"growth.{ending}", dpi=150)


if __name__ == "__main__":
    main()
