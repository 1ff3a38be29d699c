"""Every figure of a comparison with its caption."""

from ddnn.figure import Draw, Drawing, render
from ddnn.report.comparison import Curves
from ddnn.report.figures import accuracy, cost, difference, learning
from ddnn.report.summary import Summary


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
    drawings = [render(name, caption, draw) for name, (caption, draw) in wanted.items()]
    return [drawing for drawing in drawings if drawing]
