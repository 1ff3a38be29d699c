"""What a person sees: progress of a training, tables of sub-nets."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ddnn.data import DataSet
from ddnn.network import DDNN
from ddnn.suggest import Suggestion
from ddnn.wording import amount


class Display:
    """Progress bars on a terminal, one line per epoch anywhere else; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.learning = 0
        """How many nets, at the last look."""
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, total_steps: int, done: int, dataset: DataSet, net: DDNN) -> None:
        """Say what is trained on what."""
        validation = f", {len(dataset.validation)} validation" if dataset.validation is not None else ""
        self.console.print(
            f"{dataset.name}: {len(dataset.train)} training{validation}, {len(dataset.test)} test images of "
            f"{dataset.image_size} px, {len(dataset.classes)} classes",
            markup=False,
        )
        depths = ", ".join(f"{name} {kept}" for name, kept in net.depths.items())
        self.console.print(f"nets: {depths}" + (f"; resumed after step {done}" if done else ""), markup=False)
        self.total = total_steps
        self.task = self.bars.add_task("training", total=total_steps, completed=done, figures="")

    def steps(self, done: int, loss: float, top1: dict[str, float]) -> None:
        """Move the bar."""
        if 0 < self.learning < len(top1):
            self.console.print("the sub-nets join: from here on the loss is the sum of the terms of all nets")
        self.learning = len(top1)
        figures = f"loss {loss:.3f}  top-1 % " + "  ".join(f"{name} {100 * t:.1f}" for name, t in top1.items())
        self.bars.update(self.task, completed=done, figures=figures)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """One line for an epoch that ended."""
        if "validation" in metrics:
            what, scores = "validation", {name: s["top1"] for name, s in metrics["validation"].items()}
        else:
            what, scores = "training", metrics["train_top1"]
        accuracies = "  ".join(f"{name} {100 * top1:.1f}" for name, top1 in scores.items())
        self.console.print(
            f"epoch {metrics['epoch']:>3}  loss {metrics['loss']:.3f}  {what} top-1 %  {accuracies}  "
            f"{metrics['seconds']['total']:.0f} s",
            highlight=False,
        )


class ComparisonDisplay:
    """Which trainings run, how many are done and how long the rest will take; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("starting")

    def __enter__(self) -> "ComparisonDisplay":
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def comparison(self, running: list[str], done: int, total: int, seconds_left: float | None) -> None:
        """Refresh the line."""
        left = "" if seconds_left is None else f", about {_duration(seconds_left)} left"
        self.line = f"{done} of {total} trainings done{left}; running: {', '.join(running) or 'none'}"
        self.status.update(self.line)

    def finished(self, name: str, summary: Mapping[str, Any]) -> None:
        """One line for a training that ended."""
        accuracies = "  ".join(f"{net} {100 * row['top1']:.2f}" for net, row in summary["subnets"].items())
        self.console.print(f"{name:32} top-1 %  {accuracies}  {_duration(summary['train_seconds'])}", highlight=False)
        if not self.console.is_terminal and hasattr(self, "line"):
            self.console.print(self.line, highlight=False)

    def note(self, sentence: str) -> None:
        """One line for something that happened."""
        self.console.print(sentence, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def subnet_table(subnets: Mapping[str, Mapping[str, Any]], title: str, latency: str) -> Table:
    """The table a training ends with: one row per net, the full-net last."""
    table = Table(title=escape(title), caption=f"latency: {latency}", title_justify="left", caption_justify="left")
    table.add_column("sub-net")
    table.add_column("depths")
    for heading in ("parameters", "MACs", "top-1 %", "top-5 %", "latency ms"):
        table.add_column(heading, justify="right")
    for i, (name, row) in enumerate(subnets.items()):
        full = " (full-net)" if i == len(subnets) - 1 else ""
        table.add_row(
            name + full,
            "-".join(map(str, row["depths"])),
            amount(row["params"]),
            amount(row["macs"]),
            f"{100 * row['top1']:.2f}",
            f"{100 * row['top5']:.2f}",
            f"{row['latency_ms']:.2f}",
        )
    return table


def export_table(manifest: Mapping[str, Any], place: str) -> Table:
    """What was exported: one row per net."""
    size = sum(file["bytes"] for file in manifest["files"].values())
    int8 = manifest.get("int8")
    caption = f"{size / 1e6:.1f} MB in all; the outputs were compared with the network's on test images"
    if int8 is not None:
        caption = (
            f"{size / 1e6:.1f} MB in all; accuracy on {int8['accuracy_images']} {int8['split']} images; times faster "
            "than float32 here, one image at a time, one thread"
        )
    table = Table(title=escape(place), caption=caption, title_justify="left", caption_justify="left")
    table.add_column("sub-net")
    table.add_column("file")
    for heading in ("MACs", *(("float32 %", "int8 %", "faster") if int8 else ("top-1 %", "max. difference"))):
        table.add_column(heading, justify="right")
    for net in manifest["nets"]:
        if int8 is not None:
            tried = int8["nets"][net["name"]]
            figures = [f"{100 * tried[when]['top1']:.2f}" for when in ("before", "after")]
            figures.append(f"{tried['speedup']:.2f} x")
        else:
            figures = [f"{100 * net['top1']:.2f}", f"{net['parity']['max_abs']:.1e}"]
        table.add_row(escape(net["name"]), escape(net["graph"]), amount(net["macs"]), *figures)
    return table


def suggestion_table(suggestion: Suggestion) -> Table:
    """The proposals, the full-net last."""
    measured = suggestion.latency_ms is not None
    columns = ["sub-net", "depths", "MACs", "of full", "parameters", *(["latency ms"] if measured else [])]
    columns += ["adds MACs", "adds parameters", "parts"]
    table = Table(
        title=f"sub-nets of {suggestion.full_net}, images of {suggestion.image_size} px", title_justify="left"
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in (0, len(columns) - 1) else "right")
    for p in suggestion.proposals:
        latency = [f"{p.latency_ms:.2f}" if p.latency_ms is not None else ""] if measured else []
        table.add_row(
            escape(f"{p.name} ({', '.join(p.kind)})"),
            "-".join(map(str, p.depths)),
            amount(p.macs),
            f"{p.macs_share:.0%}",
            amount(p.parameters),
            *latency,
            f"{amount(p.added_macs)} ({p.added_macs / suggestion.macs:.0%})",
            amount(p.added_parameters),
            escape(p.parts),
        )
    latency = [f"{suggestion.latency_ms:.2f}"] if suggestion.latency_ms is not None else []
    row = ["full-net", "-".join(map(str, suggestion.depths)), amount(suggestion.macs), "100%"]
    table.add_row(*row, amount(suggestion.parameters), *latency, "", "", "")
    return table


def make_console(stderr: bool = False) -> Console:
    """A console that does not break lines of output that goes to a file."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160)
