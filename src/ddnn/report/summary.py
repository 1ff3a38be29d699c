"""The numbers of a comparison. Accuracies and their differences are shares in [0, 1] here, percent only when shown."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy import special  # type: ignore[import-untyped]

from ddnn.report.comparison import LABELS, Comparison, parse

BASELINE = "alone"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Accuracy minus another method's, paired by seed: the same seed saw the same images in the same order."""

    values: tuple[float, ...]
    """One per seed that both have finished."""
    mean: float
    low: float | None
    """Of the 95 % confidence interval of the mean by Student's t; None with a single seed."""
    high: float | None

    @property
    def direction(self) -> int | None:
        """1 if the interval is above 0, -1 if below, 0 if it holds 0 (no difference shown); None with a single seed."""
        if self.low is None or self.high is None:
            return None
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Row:
    """One method's accuracy with one net."""

    method: str
    net: str
    n: int
    """Seeds that are finished."""
    mean: float | None
    std: float | None
    """Sample standard deviation over seeds; None with fewer than two."""
    difference: Difference | None
    """To `alone`; None for `alone` itself and where no seed is finished in both."""


@dataclass(frozen=True)
class Cost:
    """What a method costs for all nets together; None is not known yet."""

    method: str
    absolute: dict[str, float | None]
    """Of each of `COSTS`."""
    relative: dict[str, float | None]
    """The same, divided by that of training every depth alone."""


COSTS = {
    "seconds": "wall-clock time",
    "cpu_seconds": "processor time",
    "macs_per_step": "MACs",
    "peak_memory_mb": "peak memory",
}
"""What a method costs, and what people call it. Processor time is what wall-clock time would be, times the threads, if
nothing else ran on the machine."""


@dataclass(frozen=True)
class Summary:
    """All numbers of a comparison, methods and nets in the order to show them."""

    comparison: Comparison
    methods: list[str]
    nets: list[str]
    """The full-net last."""
    rows: list[Row]
    """Method by method, in each net by net."""
    costs: list[Cost]

    def row(self, method: str, net: str) -> Row | None:
        """One of the rows; None where the method is not part of the comparison."""
        return next((row for row in self.rows if (row.method, row.net) == (method, net)), None)

    def difference(self, method: str, other: str, net: str) -> Difference | None:
        """One method's accuracy less another's; None where no seed is finished in both."""
        return _difference(self.comparison, method, other, net)

    def cost(self, method: str) -> Cost | None:
        """What this method costs; None where it is not part of the comparison."""
        return next((cost for cost in self.costs if cost.method == method), None)

    def best(self, net: str) -> Row | None:
        """The row of the highest mean of those with the most seeds of this net; None where nothing is finished."""
        rows = [row for row in self.rows if row.net == net and row.mean is not None]
        return max(rows, key=lambda row: (row.n, row.mean or 0.0), default=None)


def summarise(comparison: Mapping[str, Any]) -> Summary:
    """All numbers of a comparison, from the content of its `comparison.json`; `RunError` if that cannot be used."""
    return summary_of(parse(comparison))


def summary_of(comparison: Comparison) -> Summary:
    """`summarise` for what is checked already."""
    methods, nets = comparison.method_names, comparison.net_names
    return Summary(
        comparison,
        methods,
        nets,
        rows=[_row(comparison, method, net) for method in methods for net in nets],
        costs=[_cost(comparison, method) for method in methods],
    )


def label(method: str) -> str:
    """What people call a method."""
    return LABELS.get(method, method)


def _row(comparison: Comparison, method: str, net: str) -> Row:
    top1 = comparison.top1(method, net)
    scores = list(top1.values())
    return Row(
        method,
        net,
        n=len(scores),
        mean=statistics.fmean(scores) if scores else None,
        std=statistics.stdev(scores) if len(scores) > 1 else None,
        difference=_difference(comparison, method, BASELINE, net) if method != BASELINE else None,
    )


def _difference(comparison: Comparison, method: str, other: str, net: str) -> Difference | None:
    ours, theirs = comparison.top1(method, net), comparison.top1(other, net)
    values = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Difference(tuple(values), mean, None, None)
    # Seeds that differ by as many images each have not shown that they don't scatter: an accuracy is a whole number of
    # images, and rounding to that has this deviation (both of two accuracies; Sheppard's correction).
    rounding = 1 / (comparison.test_images * 6**0.5) if comparison.test_images else 0.0
    deviation = max(statistics.stdev(values), rounding)
    margin = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * deviation / n**0.5
    return Difference(tuple(values), mean, mean - margin, mean + margin)


def _cost(comparison: Comparison, method: str) -> Cost:
    absolute = {cost: getattr(comparison.methods[method], cost) for cost in COSTS}
    base = {cost: getattr(comparison.methods.get(BASELINE), cost, None) for cost in COSTS}
    relative = {c: absolute[c] / base[c] if base[c] and absolute[c] is not None else None for c in COSTS}
    return Cost(method, absolute, relative)
