"""How much of a training's time is not spent in forward, backward and optimiser step.

    python benchmarks/overhead.py results/cifar100-resnet8-14-20/runs/* [--json]

From the clocks in each run's `metrics.jsonl`: waiting for data, validation, and the rest, which is checkpoints, logging
and the display. Nothing is measured anew.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ddnn.checkpoint import RunFolder


def shares(run: Path) -> dict[str, float]:
    """Shares of the time of all epochs: `data`, `evaluate`, `rest`, and `outside`, which is all three."""
    spent: dict[str, float] = {}
    for epoch in RunFolder.open(run).metrics():
        for what, seconds in epoch["seconds"].items():
            spent[what] = spent.get(what, 0.0) + seconds
    total, data, evaluate = spent["total"], spent.get("data", 0.0), spent.get("evaluate", 0.0)
    outside = total - spent["step"]
    return {
        "data": data / total,
        "evaluate": evaluate / total,
        "rest": (outside - data - evaluate) / total,
        "outside": outside / total,
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    found = {str(run): shares(run) for run in wanted.runs if (run / "metrics.jsonl").exists()}
    if not found:
        parser.error("none of these is a run folder that has a metrics.jsonl")
    if wanted.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title="share of a training's time")
    table.add_column("run", overflow="fold")
    for share in ("data %", "validation %", "rest %", "outside of steps %"):
        table.add_column(share, justify="right")
    for name, of in found.items():
        table.add_row(name, *(f"{100 * of[what]:.2f}" for what in ("data", "evaluate", "rest", "outside")))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
