"""Every figure of a comparison as a file and as a part of a page."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddnn.report.comparison import Curves
from ddnn.report.figures import accuracy, cost, difference, learning
from ddnn.report.style import SETTINGS
from ddnn.report.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure | None"]


@dataclass(frozen=True)
class Drawing:
    """One figure, rendered."""

    name: str
    """Of its files, without their ending."""
    caption: str
    svg: str
    png: bytes


def draw_all(summary: Summary, curves: Curves) -> list[Drawing]:
    """Every figure there are numbers for."""
    seeds = len(summary.comparison.seeds)
    bars = f"; error bars are the standard deviation over {seeds} seeds" if seeds > 1 else "; one seed"
    machine = f" on {summary.comparison.machine}" if summary.comparison.machine else ""
    apart = "; points of one net are set apart a little sideways"
    interval = "; bars are 95% confidence intervals, small dots single seeds" if seeds > 1 else "; one seed"
    below = "; the first fifth of the epochs may lie below the frame"
    wanted: dict[str, tuple[str, Draw]] = {
        "difference": (f"Difference to the same net trained alone{interval}", lambda: difference(summary)),
        "accuracy-macs": (f"Accuracy against MACs{bars}{apart}", lambda: accuracy(summary, "macs")),
        "accuracy-latency": (
            f"Accuracy against latency, one image at a time{machine}{bars}{apart}",
            lambda: accuracy(summary, "latency_ms"),
        ),
        "cost": ("Cost of training all nets, relative to training every depth alone", lambda: cost(summary)),
        "training": (
            f"Accuracy on training images, as augmented, by epoch; mean over seeds{below}",
            lambda: learning(summary, curves.train, "training"),
        ),
        "validation": (
            f"Accuracy on validation images by epoch; mean over seeds{below}",
            lambda: learning(summary, curves.validation, "validation"),
        ),
    }
    drawings = [_render(name, caption, draw) for name, (caption, draw) in wanted.items()]
    return [drawing for drawing in drawings if drawing]


def _render(name: str, caption: str, draw: Draw) -> Drawing | None:
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
