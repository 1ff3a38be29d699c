"""What the numbers say, in words: a verdict for every net, the price, what is missing, how to read it all."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ddnn.report.comparison import LABELS, Comparison, Curves
from ddnn.report.summary import BASELINE, COSTS, Difference, Summary, label
from ddnn.wording import listed

HERO = "ekd"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

Kind = Literal["above", "below", "same", "unproven", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """DDNN-EKD against the same net trained alone."""

    net: str
    kind: Kind
    """`same`: no difference shown; `unproven`: one seed; `unknown`: one of the two is missing."""
    text: str
    best: str | None
    """Who has the highest mean, where that is not DDNN-EKD."""

    def __str__(self) -> str:
        return f"{self.net}: {self.text}." + (f" {self.best}." if self.best else "")


def title(comparison: Comparison) -> str:
    """What was compared: the data set and the nets."""
    return f"{comparison.dataset}: {', '.join(comparison.net_names)}"


def verdicts(summary: Summary) -> list[Verdict]:
    """One for every net, the full-net last."""
    return [_verdict(summary, net) for net in summary.nets]


def _verdict(summary: Summary, net: str) -> Verdict:
    kind, text = _judge(summary, net)
    best = summary.best(net)
    other = f"Highest mean: {label(best.method)}, {percent(best.mean)}%" if best and best.method != HERO else None
    return Verdict(net + (" (full-net)" if net == summary.nets[-1] else ""), kind, text, other)


def _judge(summary: Summary, net: str) -> tuple[Kind, str]:
    hero = summary.row(HERO, net)
    found = hero.difference if hero else None
    if found is None:
        missing = [label(m) for m in (HERO, BASELINE) if not (row := summary.row(m, net)) or not row.n]
        why = f"{' and '.join(missing)} missing" if missing else "no seed is finished in both"
        return "unknown", f"no verdict, {why}"
    name, base = label(HERO), label(BASELINE)
    if (ci := interval(found)) is None:
        return "unproven", f"{points(found.mean)} points from {base} to {name} with one seed, which proves nothing"
    certainty = f"95% {ci}, {len(found.values)} seeds"
    size = f"{100 * abs(found.mean):.2f}"
    if found.direction == 0:
        return "same", f"no difference shown between {name} and {base} ({points(found.mean)} points, {certainty})"
    if found.direction == 1:
        return "above", f"{name} is {size} points above {base} ({certainty})"
    return "below", f"{name} is {size} points below {base} ({certainty})"


def headline(summary: Summary) -> str:
    """Who wins, in one sentence."""
    found = verdicts(summary)
    count = Counter(verdict.kind for verdict in found)
    lacking = [label(method) for method in (HERO, BASELINE) if method not in summary.comparison.methods]
    if lacking:
        return f"No verdict: this comparison is without {listed(lacking)}."
    if count["unknown"] == len(found):
        return f"No verdict yet: {label(HERO)} and {label(BASELINE)} have no finished seed in common."
    if count["unproven"] and not count["above"] + count["below"] + count["same"]:
        return "One seed proves nothing: train at least three before you believe a difference."
    words: dict[Kind, str] = {
        "above": f"is above {label(BASELINE)} on",
        "below": f"is below {label(BASELINE)} on",
        "same": "shows no difference on",
        "unproven": "has one seed only on",
        "unknown": "has no verdict on",
    }
    clauses = [f"{text} {count[kind]}" for kind, text in words.items() if count[kind]]
    clauses[0] += f" of {len(found)} nets" if len(found) > 1 else " net"
    return f"{label(HERO)} {listed(clauses)}."


def price(summary: Summary) -> str:
    """What DDNN-EKD costs, in units of training every depth alone."""
    cost = summary.cost(HERO)
    known = [
        f"{ratio:.2f}{TIMES} the {COSTS[what]}" for what, ratio in (cost.relative if cost else {}).items() if ratio
    ]
    if not known:
        return f"Price: not known before one whole seed of {label(HERO)} and of {label(BASELINE)} is finished."
    return f"Price: {label(HERO)} took {listed(known)} of training every depth alone."


TERMS = {"Distillation": "joint", "KL": "attention", "Attention": "kl"}
"""What DDNN-EKD has, and the method that has everything but that."""


WORTH = 0.01
"""The least gain, one percentage point, that makes a term worth keeping: one whose interval lies below that for every
net is reported as not earning its place."""


def earnings(summary: Summary) -> list[str]:
    """What each term of the objective earns: DDNN-EKD less the same without it; terms with two seeds or more."""
    return [text for term, without in TERMS.items() if (text := _earned(summary, term, without))]


def _earned(summary: Summary, term: str, without: str) -> str | None:
    every = {net: summary.difference(HERO, without, net) for net in summary.nets}
    found = {net: d for net, d in every.items() if d and d.direction is not None}
    if not found:
        return None
    helped, harmed = ([net for net, d in found.items() if d.direction == sign] for sign in (1, -1))
    if helped:
        verdict = f"helps {listed(helped)}" + (f" and costs {listed(harmed)}" if harmed else "")
    elif all(d.high is not None and d.high < WORTH for d in found.values()):
        verdict = "does not earn its place here: " + (
            f"it costs {listed(harmed)}" if harmed else "no net is shown to gain"
        )
    else:  # too few seeds, or too scattered, to say so
        verdict = "is not shown to help any net" + (f", and costs {listed(harmed)}" if harmed else "")
    numbers = "; ".join(f"{net} {points(d.mean)}, {interval(d)}" for net, d in found.items())
    return f"{term} {verdict} ({label(HERO)} less {label(without)}: {numbers})."


TOLERATED = 0.002
"""How far below alone the full-net may be, as a share, and still count as not below."""


def claim(summary: Summary) -> str | None:
    """Of which methods all that DDNN-EKD promises is shown; None before a method has two seeds of every net."""
    judged = {method: found for method in summary.methods if (found := _differences(summary, method))}
    if not judged:
        return None
    promise = "every sub-net above alone, the full-net not below it"
    held, left_open = (
        [_with_price(summary, method) for method, found in judged.items() if _holds(found) == answer]
        for answer in ("yes", "open")
    )
    text = f"The claim ({promise}) is shown for {listed(held) if held else 'no method here'}"
    if left_open:
        text += f"; for {listed(left_open)} the sub-nets are above alone, and the full-net's interval leaves it open"
    return f"{text}."


def _differences(summary: Summary, method: str) -> list[Difference]:
    """To alone, net by net; empty unless every one has an interval."""
    rows = [summary.row(method, net) for net in summary.nets]
    found = [row.difference for row in rows if row and row.difference and row.difference.direction is not None]
    return found if len(found) == len(summary.nets) else []


def _holds(differences: list[Difference]) -> Literal["yes", "no", "open"]:
    *subnets, full = differences
    if not all(d.direction == 1 for d in subnets) or full.low is None or full.mean < -TOLERATED:
        return "no"
    return "yes" if full.low >= -TOLERATED else "open"


def _with_price(summary: Summary, method: str) -> str:
    cost = summary.cost(method)
    ratio = cost.relative["macs_per_step"] if cost else None
    return label(method) + (f" ({ratio:.2f}{TIMES} the MACs)" if ratio else "")


def missing(summary: Summary, curves: Curves | None = None) -> list[str]:
    """What a reader might look for and not find, one sentence each."""
    comparison = summary.comparison
    found = []
    if absent := [text for method, text in LABELS.items() if method not in comparison.methods]:
        found.append(f"Not part of this comparison: {', '.join(absent)}.")
    if BASELINE not in comparison.methods:
        found.append("Without nets trained alone there are no paired differences and no relative costs.")
    if late := [text for method in summary.methods if (text := _unfinished(summary, method))]:
        found.append(f"Not finished: {'; '.join(late)}.")
    if unmeasured := [net for net in summary.nets if net not in comparison.nets]:
        found.append(f"MACs and latency not measured yet: {', '.join(unmeasured)}.")
    if curves and curves.unreadable:
        found.append(f"Training curves leave out runs whose folders cannot be read: {', '.join(curves.unreadable)}.")
    return found


def _unfinished(summary: Summary, method: str) -> str:
    """Such as 'KL only (seed 1; seed 2 of resnet20)'."""
    parts = []
    for seed in summary.comparison.seeds:
        late = [net for net in summary.nets if seed not in summary.comparison.top1(method, net)]
        if late:
            parts.append(f"seed {seed}" + (f" of {', '.join(late)}" if len(late) < len(summary.nets) else ""))
    return f"{label(method)} ({'; '.join(parts)})" if parts else ""


def notes(summary: Summary) -> list[str]:
    """How to read the numbers."""
    comparison = summary.comparison
    found = ["Top-1 accuracy on the test images after the last epoch, in percent; differences in percent points."]
    if len(comparison.seeds) == 1:
        found.append("One seed proves nothing: there is no deviation and no interval.")
    else:
        found.append(
            f"Mean ± sample standard deviation over {len(comparison.seeds)} seeds. Differences to alone are paired by "
            "seed; their 95% confidence intervals follow Student's t, are not corrected for the number of "
            "comparisons, and speak of the variation between seeds on this one test set."
        )
    means = [row.mean for row in summary.rows if row.mean is not None]
    if comparison.test_images and means:
        middle = sorted(means)[len(means) // 2]
        error = (middle * (1 - middle) / comparison.test_images) ** 0.5
        found.append(
            f"Another test set of {comparison.test_images:,} images would move an accuracy by about "
            f"{percent(error)} points (standard error)."
        )
    if comparison.full_net_epochs:
        found.append(
            f"All nets together have {comparison.epochs} epochs; in the first {comparison.full_net_epochs} of them the "
            "full-net learns by itself, and then its sub-nets join it."
        )
    if comparison.alone_epochs not in (None, comparison.epochs):
        found.append(f"A net alone has {comparison.alone_epochs} epochs, all nets together {comparison.epochs}.")
    found.append(
        "Costs are those of all trainings that give all nets, a full-net's that is trained before them included: "
        "wall-clock time is their sum, MACs are their sum divided by the steps of one training alone, peak memory "
        "is that of the largest. Bold: the highest mean of a net, proven or not."
    )
    if comparison.commit and (count := len(comparison.commit.split(", "))) > 1:
        found.append(
            f"The trainings were made by {count} versions of the code, given below. MACs don't depend on that; times "
            "and peak memory may, and on what else the machine did."
        )
    several = [package for package, numbers in comparison.versions.items() if ", " in numbers]
    where = [f"{len(comparison.machines)} kinds of machine"] if len(comparison.machines) > 1 else []
    where += [f"several versions of {listed(several)}"] if several else []
    if where:
        found.append(f"The trainings ran on {listed(where)}: times, peak memory and latencies are not comparable.")
    return found


def details(comparison: Comparison) -> dict[str, str]:
    """What it takes to do the comparison again."""
    versions = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    found = {
        "data set": comparison.dataset,
        "recipe": comparison.recipe,
        "epochs": comparison.epochs,
        "seeds": ", ".join(map(str, comparison.seeds)),
        "test images": f"{comparison.test_images:,}" if comparison.test_images else None,
        "machine": comparison.machine,
        "versions": versions,
        "commit": comparison.commit,
    }
    return {name: str(value) for name, value in found.items() if value}


def percent(share: float | None) -> str:
    """A share as a percentage with two decimals; a dash where there is none."""
    return "\N{EM DASH}" if share is None else f"{100 * share:.2f}"


def points(difference: float) -> str:
    """A difference of shares in percent points, always with its sign."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}".replace("-", MINUS)


def interval(difference: Difference) -> str | None:
    """The confidence interval in percent points; None with a single seed."""
    if difference.low is None or difference.high is None:
        return None
    return f"CI {points(difference.low)} to {points(difference.high)}"
