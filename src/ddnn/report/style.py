"""How the methods of a comparison look in its figures."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ddnn.figure import new_figure, short
from ddnn.report.sentences import HERO
from ddnn.report.summary import BASELINE, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "ekd": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "alone": {"color": "#000000", "linestyle": (0, (4, 1.5)), "marker": "s"},
    "joint": {"color": "#E69F00", "linestyle": (0, (1, 1.2)), "marker": "^"},
    "kl": {"color": "#009E73", "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
    "attention": {"color": "#CC79A7", "linestyle": (0, (2.5, 2)), "marker": "v"},
    "two-model-kd": {"color": "#D55E00", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5)), "marker": "<"},
    "ekd-pretrained": {"color": "#004060", "linestyle": (0, (5, 1)), "marker": "P"},
    "adaptive-depth": {"color": "#56B4E9", "linestyle": (0, (8, 3)), "marker": ">"},
}
"""Colours of Okabe and Ito, told apart by the colour-blind; line styles and markers do the same in grey."""

GREYS = ("#707070", "#9A9A9A", "#505050")  # for options beyond the known methods
MARKERS = ("p", "d", "h", "*", "8")


def panels_of(
    titles: Sequence[str], row_height: float, sharey: bool, below: float = 0.3
) -> tuple["Figure", dict[str, "Axes"]]:
    """A grid of panels of three in a row, by their titles, the last row's rest left empty."""
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = new_figure({1: 5.4, 2: 7.6, 3: 9.6}[columns], rows * row_height + below)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.1 if rows > 1 else 0.04)  # inches; ticks end at corners
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False)
    places = list(grid.flat)
    for axes, text in zip(places, titles, strict=False):
        axes.set_title(short(text), loc="left")
        axes.tick_params(axis="x", labelbottom=True)
    for axes in places[len(titles) :]:
        axes.set_visible(False)
    return figure, dict(zip(titles, places, strict=False))


def style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Colour, line style and marker of one of a comparison's methods; those beyond the known get greys in turn."""
    if method in STYLES:
        return STYLES[method]
    turn = [name for name in methods if name not in STYLES].index(method)
    return {
        "color": GREYS[turn % len(GREYS)],
        "linestyle": (0, (3 + turn, 1.5, 1, 1.5)),
        "marker": MARKERS[turn % len(MARKERS)],
    }


def line(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """What to look at is thick and full, the rest thin and hollow."""
    if method == HERO:
        look: dict[str, Any] = {"linewidth": 2.6, "markersize": 7, "zorder": 5}
    elif method == BASELINE:
        look = {"linewidth": 2.0, "markersize": 6, "zorder": 4}
    else:
        look = {"linewidth": 1.1, "markersize": 5, "markerfacecolor": "white", "zorder": 3}
    return {**style(method, methods), **look}


def label_rows(axes: "Axes", methods: Sequence[str]) -> None:
    """One row per method from the top, named on the left, DDNN-EKD in bold."""
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_yticks(range(len(methods)), [short(label(method)) for method in methods])
    axes.tick_params(axis="y", length=0)
    for tick, method in zip(axes.get_yticklabels(), methods, strict=False):  # inner panels have none
        tick.set_fontweight("bold" if method == HERO else "normal")
