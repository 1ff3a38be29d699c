"""What figures show. Each function makes one, or None where there are no numbers for it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ddnn.figure import legend, name_nets, new_figure
from ddnn.report.comparison import Comparison
from ddnn.report.sentences import HERO, TIMES
from ddnn.report.style import label_rows, line, panels_of, style
from ddnn.report.summary import BASELINE, COSTS, Summary, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def difference(summary: Summary) -> "Figure | None":
    """Paired differences to alone with their intervals, one panel per net: right of the line is better."""
    methods = [m for m in summary.methods if any(r.difference for r in summary.rows if r.method == m)]
    if not methods:
        return None
    figure, panels = panels_of(summary.nets, row_height=0.75 + 0.27 * len(methods), sharey=True)
    for net, axes in panels.items():
        axes.axvline(0, color="black", linewidth=1.2, zorder=1)
        for place, method in enumerate(methods):
            row = summary.row(method, net)
            if row is None or row.difference is None:
                continue
            look, found = style(method, summary.methods), row.difference
            if found.low is not None and found.high is not None:
                width = 2.6 if method == HERO else 1.3
                axes.plot([100 * found.low, 100 * found.high], [place] * 2, color=look["color"], linewidth=width)
                values = [100 * value for value in found.values]
                axes.plot(values, [place + 0.28] * len(values), ".", color="#777777", markersize=3)
            axes.plot(
                [100 * found.mean], [place], color=look["color"], marker=look["marker"], label=label(method),
                markersize=8 if method == HERO else 6, markeredgecolor="white", linestyle="none", zorder=4,
            )  # fmt: skip
        label_rows(axes, methods)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    figure.supxlabel("top-1 difference to alone (percent points); right of the line is better", fontsize=9.5)
    return figure


def accuracy(summary: Summary, against: Literal["macs", "latency_ms"]) -> "Figure | None":
    """Accuracy of every method over what the nets cost at run time: one curve per method, error bars over seeds."""
    at = {name: getattr(net, against) for name, net in summary.comparison.nets.items()}
    unit, name = 1.0, "latency of one image (ms)"
    if against == "macs":
        unit, letter = (1e9, "G") if max(at.values(), default=0) >= 1e9 else (1e6, "M")
        name = f"MACs per image ({letter})"
    at = {net: value / unit for net, value in sorted(at.items(), key=lambda item: item[1])}
    methods = [m for m in summary.methods if any((r := summary.row(m, net)) and r.n for net in at)]
    if not methods:
        return None
    figure = new_figure(5.4, 4.3 + 0.2 * math.ceil(len(methods) / 2))
    axes = figure.subplots()
    span = (max(at.values()) - min(at.values())) or max(at.values()) or 1.0
    # Points of one net are set apart, but not into the next net's.
    gap = min((b - a for a, b in itertools.pairwise(at.values())), default=span)
    step = min(0.009 * span, 0.6 * gap / len(methods))
    for place, method in enumerate(methods):
        rows = {net: row for net in at if (row := summary.row(method, net)) and row.mean is not None}
        aside = (place + 1) // 2 * (-1) ** place * step  # the first in its place, the rest left and right of it
        std = [math.nan if row.std is None else 100 * row.std for row in rows.values()]
        axes.errorbar(
            [at[net] + aside for net in rows],
            [100 * (row.mean or 0.0) for row in rows.values()],
            yerr=None if all(map(math.isnan, std)) else std,
            label=label(method),
            capsize=2.5,
            elinewidth=1.6 if method == HERO else 0.9,
            **line(method, summary.methods),
        )
    axes.set_xlabel(name)
    axes.set_ylabel("top-1 accuracy on the test images (%)")
    axes.margins(x=0.06, y=0.08)
    axes.grid(axis="y")
    name_nets(axes, at)
    legend(figure, [axes], columns=2)
    return figure


def learning(
    summary: Summary, curves: Mapping[tuple[str, str], Sequence[float]], what: Literal["training", "validation"]
) -> "Figure | None":
    """Accuracy by epoch, one panel per net, one line per method."""
    nets = [net for net in summary.nets if any(found == net for _, found in curves)]
    if not nets:
        return None
    from matplotlib.ticker import MaxNLocator

    methods = [m for m in summary.methods if any(found == m for found, _ in curves)]
    figure, panels = panels_of(nets, row_height=3.3, sharey=True, below=0.2 + 0.2 * math.ceil(len(methods) / 4))
    longest = max(len(curve) for curve in curves.values())
    shown = [top1 for curve in curves.values() for top1 in curve[longest // 5 :] if not math.isnan(top1)]
    for net, axes in panels.items():
        for place, method in enumerate(methods):
            curve = curves.get((method, net), ())
            if curve:
                every = max(1, longest // 6)
                first = min(place * every // len(methods), len(curve) - 1)  # markers of the methods do not coincide
                axes.plot(
                    range(1, len(curve) + 1),
                    [100 * top1 for top1 in curve],
                    label=label(method),
                    markevery=(first, every),
                    **{**line(method, summary.methods), "markersize": 5 if method in (HERO, BASELINE) else 4},
                )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
        if shown:  # from where methods begin to differ; the steep first epochs would press them together
            axes.set_ylim(100 * min(shown) - 1, 100 * max(shown) + 1)
    figure.supylabel(f"top-1 on {what} images (%)", fontsize=9.5)
    legend(figure, list(panels.values()), columns=4)
    return figure


def cost(summary: Summary) -> "Figure | None":
    """Bars of what every method costs, relative to training every depth alone."""
    costs = [cost for cost in summary.costs if any(ratio is not None for ratio in cost.relative.values())]
    if not any(found.method != BASELINE for found in costs):
        return None
    names = {what: name for what, name in COSTS.items() if any(found.relative[what] for found in costs)}
    if "cpu_seconds" in names and "seconds" in names:
        # On a CPU they are the same but for what else the machine did; beside a GPU, a processor only launches work.
        names.pop("cpu_seconds" if _on_gpus(summary.comparison) else "seconds")
    most = max(ratio or 1.0 for found in costs for ratio in found.relative.values())
    figure, panels = panels_of(list(names.values()), row_height=0.75 + 0.27 * len(costs), sharey=True)
    for what, axes in zip(names, panels.values(), strict=True):
        ratios = [found.relative[what] for found in costs]
        colours = [{HERO: "#0072B2", BASELINE: "#222222"}.get(found.method, "#B5B5B5") for found in costs]
        axes.barh(range(len(costs)), [ratio or 0.0 for ratio in ratios], height=0.62, color=colours)
        for place, (found, ratio) in enumerate(zip(costs, ratios, strict=True)):
            text = "not known" if ratio is None else f"{ratio:.2f}{TIMES}"
            weight = "bold" if found.method == HERO else "normal"
            axes.annotate(
                text, (ratio or 0.0, place), (5, 0), textcoords="offset points",
                va="center_baseline", fontweight=weight, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1.0, linestyle=(0, (4, 2)), zorder=0.5)
        axes.set_xlim(0, 1.3 * most)
        label_rows(axes, [found.method for found in costs])
    figure.supxlabel("relative to training every depth alone (dashed line: 1.0); less is better", fontsize=9.5)
    return figure


def _on_gpus(comparison: Comparison) -> bool:
    """Whether a training ran on one; of a machine unknown it is taken for granted that none did."""
    machines = comparison.machines or [comparison.machine or "CPU"]
    return not all(machine.startswith("CPU") for machine in machines)
