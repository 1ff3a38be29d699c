"""The numbers of a cascade in tables, the same for a page and a terminal."""

from ddnn.page import Cell, Table
from ddnn.runtime.cascade import NEVER
from ddnn.runtime.curve import Curve, Point
from ddnn.runtime.sentences import match, percent


def curve_table(curve: Curve) -> Table:
    """Every fixed depth, then every cascade, cheap to dear."""
    headings = ["", "top-1", *(f"by {net}" for net in curve.nets), "MACs", *(_batch(batch) for batch in curve.batches)]
    rows = [[Cell(point.name, strong=True), *_numbers(curve, point)] for point in curve.fixed]
    for i, point in enumerate(curve.points):
        name = "chosen" if i == curve.chosen else "cascade"
        text = Cell(name, " ".join(map(threshold, point.thresholds)), strong=i == curve.chosen)
        rows.append([text, *_numbers(curve, point)])
    return Table(headings, rows)


def _numbers(curve: Curve, point: Point) -> list[Cell]:
    shares = [Cell(f"{share:.0%}" if share else "-") for share in point.share]
    times = [Cell(f"{point.took[b].mean:.3g}", f"p95 {point.took[b].p95:.3g}") for b in curve.batches]
    return [Cell(percent(point.accuracy)), *shares, Cell(_short(point.macs)), *times]


def match_table(curve: Curve) -> Table:
    """The quickest cascade that is as accurate as each depth."""
    rows = []
    for depth in curve.fixed[1:]:
        cells = [Cell(depth.name), Cell(percent(depth.accuracy))]
        for batch in curve.batches:
            each = match(curve, depth, batch)
            if each.point is None:
                cells.append(Cell("not reached"))
                continue
            took = f"{each.point.took[batch].mean:.3g} instead of {depth.took[batch].mean:.3g}"
            cells.append(Cell(f"{each.ratio:.2f}\N{MULTIPLICATION SIGN}", took, strong=each.pays))
        rows.append(cells)
    return Table(["as accurate as", "top-1", *(_batch(batch) for batch in curve.batches)], rows)


def threshold(value: float) -> str:
    """A threshold for a person."""
    return "never" if value >= NEVER else "always" if value == 0 else f"{value:.4f}"


def _batch(batch: int) -> str:
    return "ms, one image" if batch == 1 else f"ms, batch {batch}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
