"""The numbers of a comparison in tables, the same for Markdown and HTML."""

from collections.abc import Callable, Mapping
from typing import Any

from ddnn.page import Cell, Table
from ddnn.report import sentences
from ddnn.report.sentences import TIMES, interval, percent, points
from ddnn.report.summary import BASELINE, COSTS, Difference, Row, Summary, label, summarise
from ddnn.wording import amount

NOTHING = "\N{EM DASH}"


def accuracy_table(summary: Summary) -> Table:
    """Methods by nets: mean, deviation, paired difference to alone and its interval."""
    rows = []
    for method in summary.methods:
        cells = [_accuracy(summary, row) for net in summary.nets if (row := summary.row(method, net))]
        rows.append([_head(method), *cells])
    return Table(["method", *(_net(summary, net) for net in summary.nets)], rows)


def _accuracy(summary: Summary, row: Row) -> Cell:
    if row.mean is None:
        return Cell(NOTHING, "not finished")
    text = percent(row.mean) + (f" ± {percent(row.std)}" if row.std is not None else "")
    details = []
    if row.difference:
        details.append(points(row.difference.mean))
        if ci := interval(row.difference):
            details.append(ci)
    if row.n < len(summary.comparison.seeds):
        details.append(f"{row.n} of {len(summary.comparison.seeds)} seeds")
    return Cell(text, ", ".join(details), strong=row is summary.best(row.net))


def rival_table(summary: Summary) -> Table:
    """DDNN-EKD less every other method, net by net; no rows where DDNN-EKD is missing or has no rival."""
    rows = []
    for method in summary.methods:
        found = [summary.difference(sentences.HERO, method, net) for net in summary.nets]
        if method not in (sentences.HERO, BASELINE) and any(found):
            rows.append([_head(method), *(Cell(NOTHING) if d is None else _rival(d) for d in found)])
    return Table(["method", *(_net(summary, net) for net in summary.nets)], rows)


def _rival(difference: Difference) -> Cell:
    return Cell(points(difference.mean), interval(difference) or "one seed", strong=difference.direction == 1)


def cost_table(summary: Summary) -> Table:
    """Methods by costs, each with its ratio to training every depth alone."""
    show: dict[str, Callable[[float], str]] = {
        "seconds": _duration,
        "cpu_seconds": _duration,
        "macs_per_step": amount,
        "peak_memory_mb": lambda megabytes: f"{megabytes:,.0f} MB",
    }
    rows = []
    for cost in summary.costs:
        cells = [_head(cost.method)]
        for what in COSTS:
            value, ratio = cost.absolute[what], cost.relative[what]
            text = NOTHING if value is None else show[what](value)
            cells.append(Cell(text, "" if ratio is None else f"{ratio:.2f}{TIMES}"))
        rows.append(cells)
    return Table(["method", *COSTS.values()], rows)


def net_table(summary: Summary) -> Table:
    """What each net is and needs once trained."""
    rows = []
    for name in summary.nets:
        cells = [Cell(NOTHING)] * 4
        if net := summary.comparison.nets.get(name):
            depths = "-".join(map(str, net.depths))
            cells = [Cell(depths), Cell(amount(net.params)), Cell(amount(net.macs)), Cell(f"{net.latency_ms:.2f} ms")]
        rows.append([Cell(_net(summary, name)), *cells])
    return Table(["net", "depths", "parameters", "MACs per image", "latency of one image"], rows)


def _head(method: str) -> Cell:
    return Cell(label(method), strong=method == sentences.HERO)


def _net(summary: Summary, net: str) -> str:
    return net + (" (full-net)" if net == summary.nets[-1] else "")


def markdown(comparison: Mapping[str, Any]) -> str:
    """The whole report of one comparison without its figures, from the content of its `comparison.json`."""
    return markdown_of(summarise(comparison))


def markdown_of(summary: Summary, missing: list[str] | None = None, figures: Mapping[str, str] | None = None) -> str:
    """Markdown of a comparison: verdicts, tables, and the figures of these paths by their captions."""
    parts = [f"## {escape(sentences.title(summary.comparison))}"]
    parts.append(f"**{escape(sentences.headline(summary))}**")
    said = [*map(str, sentences.verdicts(summary)), sentences.price(summary), sentences.claim(summary)]
    said += sentences.earnings(summary)
    parts.append(_bullets([sentence for sentence in said if sentence]))
    for heading, table in (
        ("Accuracy: top-1 in percent (difference to alone in points, 95% CI)", accuracy_table(summary)),
        (f"{label(sentences.HERO)} less the others (points, paired by seed, 95% CI)", rival_table(summary)),
        ("Cost of training all nets (relative to training every depth alone)", cost_table(summary)),
        ("Nets", net_table(summary)),
    ):
        if table.rows:
            parts += [f"### {heading}", markdown_table(table)]
    parts += [f"![{escape(caption)}]({path})" for caption, path in (figures or {}).items()]
    if missing := sentences.missing(summary) if missing is None else missing:
        parts += ["### Missing", _bullets(missing)]
    about = [f"{name}: {value}" for name, value in sentences.details(summary.comparison).items()]
    parts += ["### How to read this", _bullets([*sentences.notes(summary), "; ".join(about) + "."])]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, the first column to the left and all others to the right."""
    lines = [[escape(heading) for heading in table.headings], ["---", *["---:"] * (len(table.headings) - 1)]]
    for row in table.rows:
        lines.append([_markdown_cell(cell) for cell in row])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{escape(cell.text)}**" if cell.strong else escape(cell.text)
    return text + (f" ({escape(cell.detail)})" if cell.detail else "")


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def escape(text: str) -> str:
    """Names may hold what means something to Markdown, such as the bars of a table or HTML."""
    for character in "\\|*_`<[":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
