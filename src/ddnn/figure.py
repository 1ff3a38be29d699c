"""Figures: legible in colour, by the colour-blind, and in grey print; as files and as parts of a page.

Only matplotlib's `Figure` is used, no pyplot, so nothing is global and no window is opened.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure | None"]

SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so a figure is the same everywhere
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 3.6,  # long enough to tell the dashes apart
    "svg.fonttype": "path",
    "text.parse_math": False,  # a `$` in a name is a dollar
}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that keeps its parts from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def name_nets(axes: "Axes", at: Mapping[str, float]) -> None:
    """Write the nets' names above the plot, in as many rows as it takes to keep them apart."""
    low, high = axes.get_xlim()
    ends: list[float] = []  # where the last name of each row ends, in x
    for net, x in at.items():
        axes.axvline(x, color="#D0D0D0", linewidth=0.8, zorder=0.5)
        half = len(short(net)) * 0.0075 * (high - low)
        row = next((i for i, end in enumerate(ends) if x - half > end), len(ends))
        ends[row : row + 1] = [x + half]
        axes.annotate(
            short(net), (x, 1), (0, 4 + 13 * row), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", color="#333333", fontsize=9, zorder=2 - 0.1 * row,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#D0D0D0", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def legend(figure: "Figure", panels: Sequence["Axes"], columns: int) -> None:
    """One legend under the panels, every method once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    figure.legend(handles.values(), map(short, handles), loc="outside lower center", ncols=columns)


def short(text: str) -> str:
    """A name that fits."""
    text = " ".join(text.split())
    return text if len(text) <= 28 else text[:27] + "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Drawing:
    """One figure, rendered."""

    name: str
    """Of its files, without their ending."""
    caption: str
    svg: str
    png: bytes


def render(name: str, caption: str, draw: Draw) -> Drawing | None:
    """The figure as SVG and PNG, the same bytes for the same numbers."""
    import matplotlib

    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = draw()
        if figure is None:
            return None
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return Drawing(name, caption, svg.getvalue(), png.getvalue())


def inline(drawing: Drawing, prefix: str) -> str:
    """The SVG as an element of a page. Ids get a prefix, since they hold for the whole page."""
    element = drawing.svg[drawing.svg.index("<svg") :]
    element = re.sub(r' id="(?:[a-z]+_)*\d+"', "", element)  # names of parts, which nothing refers to
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", element)
