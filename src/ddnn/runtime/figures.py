"""What a profile and a cascade look like."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ddnn.figure import Drawing, new_figure, render, short
from ddnn.runtime.curve import Curve, Point
from ddnn.runtime.manifest import Net
from ddnn.runtime.profile import Profile, Row
from ddnn.runtime.sentences import standard_error
from ddnn.wording import counted, threads_and_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLACK: dict[str, Any] = {"color": "#000000", "linestyle": (0, (4, 1.5)), "marker": "s", "markersize": 6}
_BLUE: dict[str, Any] = {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 5, "linewidth": 2.2}
_SERIES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (1, 1.2)), "marker": "^"},
    {"color": "#CC79A7", "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
)


def draw_cascade(curve: Curve) -> Drawing:
    """Accuracy against mean latency, the cascade and every depth alone; a panel for every batch size."""
    batches = curve.batches

    def draw() -> "Figure":
        figure, panels = _panels(len(batches))
        for batch, axes in zip(batches, panels, strict=True):
            points = sorted(curve.points, key=lambda point: point.took[batch].mean)
            fixed = sorted(curve.fixed, key=lambda point: point.took[batch].mean)
            errors = [100 * standard_error(point, curve.judged) for point in fixed]
            axes.plot(
                [p.took[batch].mean for p in points], _accuracies(points),
                label="cascade, by its thresholds", zorder=3, **_BLUE,
            )  # fmt: skip
            axes.errorbar(
                [p.took[batch].mean for p in fixed], _accuracies(fixed), yerr=errors, elinewidth=0.9, capsize=2.5,
                label="one depth for all images", linewidth=1.4, zorder=4, **_BLACK,
            )  # fmt: skip
            chosen = curve.points[curve.chosen]
            axes.plot(
                [chosen.took[batch].mean], [100 * chosen.accuracy], linestyle="none", marker="o", markersize=13,
                markerfacecolor="none", markeredgecolor="#D55E00", markeredgewidth=2, zorder=5, label="chosen",
            )  # fmt: skip
            for p in fixed:  # the name goes where the curve is not
                curve_at = float(
                    np.interp(p.took[batch].mean, [q.took[batch].mean for q in points], _accuracies(points))
                )
                _name(axes, p.name, (p.took[batch].mean, 100 * p.accuracy), above=curve_at < 100 * p.accuracy)
            axes.set_title("one image at a time" if batch == 1 else f"batches of {batch}", loc="left")
            axes.set_xlabel("mean latency of a call (ms)")
        low, high = panels[0].get_ylim()  # not so near that chance looks like a difference
        middle, half = (low + high) / 2, max((high - low) / 2, 4 * max(errors))
        panels[0].set_ylim(middle - half, middle + half)
        panels[0].set_ylabel("top-1 on held-out images (%)")
        _legend(figure, panels[0], columns=3)
        return figure

    where = f"{curve.machine}, {counted(curve.threads, 'thread')}"
    caption = f"Accuracy against measured latency on {where}; bars are one standard error"
    return _drawn("cascade", caption, draw)


def draw_profile(profile: Profile, nets: Mapping[str, Net]) -> Drawing:
    """Accuracy against latency; a panel for every batch size, a line for every number of threads."""
    batches = sorted({row.batch for row in profile.rows})
    settings = sorted({(row.shared, row.threads) for row in profile.rows})

    def draw() -> "Figure":
        figure, panels = _panels(len(batches))
        for batch, axes in zip(batches, panels, strict=True):
            for setting, look in zip(settings, _SERIES * len(settings), strict=False):
                rows = [r for r in profile.rows if r.batch == batch and (r.shared, r.threads) == setting]
                _series(axes, rows, nets, setting, look)
            longest = max((row for row in profile.rows if row.batch == batch), key=lambda row: row.p50_ms)
            rows = [r for r in profile.rows if r.condition == longest.condition]
            for row in rows:
                _name(axes, row.depth, (row.p50_ms, 100 * (nets[row.depth].top1 or 0)), above=False)
            axes.set_title("one image at a time" if batch == 1 else f"batches of {batch}", loc="left")
            axes.set_xlabel("latency of a call (ms): median, bar to the 95th percentile")
            axes.set_xlim(left=0)
        panels[0].set_ylabel("top-1 on the test images (%)")
        _legend(figure, panels[0], columns={1: 1, 3: 3}.get(len(settings), 2))
        return figure

    return _drawn("profile", f"Accuracy against latency of every depth on {profile.machine}", draw)


def _series(
    axes: "Axes", rows: list[Row], nets: Mapping[str, Net], setting: tuple[bool, int], look: dict[str, Any]
) -> None:
    """The depths under one setting."""
    shared, threads = setting
    axes.errorbar(
        [row.p50_ms for row in rows], [100 * (nets[row.depth].top1 or 0) for row in rows],
        xerr=([0.0] * len(rows), [max(0.0, row.p95_ms - row.p50_ms) for row in rows]),
        label=threads_and_weights(threads, shared), linewidth=1.8, elinewidth=1.1, capsize=3, markersize=6, **look,
    )  # fmt: skip


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = new_figure({1: 6.2, 2: 8.4, 3: 11.0}[columns], 0.6 + 3.5 * rows)
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in grid:
        axes.grid(axis="y")
        axes.margins(x=0.16, y=0.12)
        axes.tick_params(labelleft=True)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _name(axes: "Axes", name: str, place: tuple[float, float], *, above: bool) -> None:
    """Write a name left above a point, or right below it."""
    axes.annotate(
        short(name), place, (-6, 4) if above else (6, -5), textcoords="offset points", fontsize=9, zorder=2,
        ha="right" if above else "left", va="bottom" if above else "top",
    )  # fmt: skip


def _accuracies(points: Sequence[Point]) -> list[float]:
    return [100 * point.accuracy for point in points]


def _legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _drawn(name: str, caption: str, draw: Any) -> Drawing:
    drawing = render(name, caption, draw)
    assert drawing is not None
    return drawing
