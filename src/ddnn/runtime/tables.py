"""The numbers of a cascade in tables, the same for a page and a terminal."""

from ddnn.page import Cell, Table
from ddnn.runtime.cascade import NEVER
from ddnn.runtime.curve import Curve, Point
from ddnn.runtime.sentences import match
from ddnn.wording import amount, three


def curve_table(curve: Curve) -> Table:
    """Every fixed depth, then every cascade, cheap to dear."""
    headings = ["", "thresholds", "top-1 %", *(f"by {net}" for net in curve.nets), "MACs"]
    headings += [_batch(batch) for batch in curve.batches]
    rows = [[Cell(point.name), Cell(""), *_numbers(curve, point)] for point in curve.fixed]
    for i, point in enumerate(curve.points):
        chosen = i == curve.chosen
        thresholds = Cell(", ".join(map(threshold, point.thresholds)), strong=chosen)
        rows.append([Cell("chosen" if chosen else "cascade", strong=chosen), thresholds, *_numbers(curve, point)])
    return Table(headings, rows)


def _numbers(curve: Curve, point: Point) -> list[Cell]:
    shares = [Cell(f"{share:.0%}" if share else "-") for share in point.share]
    times = [Cell(three(point.took[b].mean), f"p95 {three(point.took[b].p95)}") for b in curve.batches]
    return [Cell(f"{100 * point.accuracy:.2f}"), *shares, Cell(amount(point.macs, "\N{NO-BREAK SPACE}")), *times]


def match_table(curve: Curve) -> Table:
    """The quickest cascade that is as accurate as each depth."""
    rows = []
    for depth in curve.fixed[1:]:
        cells = [Cell(depth.name), Cell(f"{100 * depth.accuracy:.2f}")]
        for batch in curve.batches:
            each = match(curve, depth, batch)
            if each.point is None:
                cells.append(Cell("not reached"))
                continue
            took = f"{three(each.point.took[batch].mean)} instead of {three(depth.took[batch].mean)}"
            cells.append(Cell(f"{each.ratio:.2f}\N{MULTIPLICATION SIGN}", took, strong=each.pays))
        rows.append(cells)
    return Table(["as accurate as", "top-1 %", *(_batch(batch) for batch in curve.batches)], rows)


def threshold(value: float) -> str:
    """A threshold for a person: the confidence needed, or that any will do, or that the net is not asked."""
    return "left out" if value >= NEVER else "all" if value == 0 else f"{value:.3f}"


def _batch(batch: int) -> str:
    return "ms, one image" if batch == 1 else f"ms, batch {batch}"
