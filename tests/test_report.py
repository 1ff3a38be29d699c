import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text

from ddnn import recipe
from ddnn.checkpoint import RunFolder
from ddnn.errors import RunError
from ddnn.report import markdown, summarise, write
from ddnn.report.comparison import Curves, parse, read_curves
from ddnn.report.drawing import draw_all
from ddnn.report.figures import accuracy, cost, difference, learning
from ddnn.report.sentences import MINUS, TIMES, claim, earnings, headline, missing, points, price, verdicts
from ddnn.report.style import STYLES, style

Scores = Sequence[float | None]


def method(seconds: float | None = 100.0, **nets: Scores) -> dict[str, Any]:
    macs = None if seconds is None else seconds * 1e9
    memory = None if seconds is None else seconds * 5
    cpu = None if seconds is None else seconds * 2
    return {
        "subnets": nets,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "macs_per_step": macs,
        "peak_memory_mb": memory,
        "runs": {},
    }


def comparison(methods: Mapping[str, dict[str, Any]], seeds: Sequence[int] = (0, 1, 2), **more: Any) -> dict[str, Any]:
    nets = {
        "small": {"depths": [1, 1, 1], "params": 83892, "macs": 12_500_000, "latency_ms": 0.7},
        "big": {"depths": [3, 3, 3], "params": 278324, "macs": 40_900_000, "latency_ms": 1.6},
    }
    about = {
        "machine": "CPU, 2 threads",
        "versions": {"torch": "2.9"},
        "test_images": 10000,
        "epochs": 4,
        "commit": "abc",
    }
    start = {"dataset": "cifar100", "recipe": "a-recipe", "seeds": list(seeds), "nets": nets, "methods": dict(methods)}
    return {**start, **about, **more}


EKD = method(72.0, small=[0.551, 0.549, 0.553], big=[0.630, 0.632, 0.628])
ALONE = method(100.0, small=[0.530, 0.526, 0.527], big=[0.631, 0.629, 0.630])
KL = method(70.0, small=[0.520, 0.519, 0.518], big=[0.640, None, 0.641])


@pytest.fixture
def whole() -> dict[str, Any]:
    return comparison({"alone": ALONE, "kl": KL, "ekd": EKD})


def folder_of(path: Path, content: dict[str, Any], epochs: int = 0) -> Path:
    """A comparison's folder; with `epochs`, its runs have trained for so many."""
    path.mkdir(parents=True)
    for name, found in content["methods"].items():
        nets = list(found["subnets"])
        solo = name == "alone"
        for seed in content["seeds"]:
            runs = {f"{name}-{net}-seed{seed}": [net] for net in nets} if solo else {f"{name}-seed{seed}": nets}
            found["runs"][str(seed)] = list(runs)
            for run, inside in runs.items() if epochs else ():
                rows = [
                    {"epoch": e, "train_top1": dict.fromkeys(inside, 0.1 * e + 0.01 * seed)}
                    for e in range(1, epochs + 1)
                ]
                RunFolder.create(path / "runs" / run, recipe.load("digits")).write_metrics(rows)
    (path / "comparison.json").write_text(json.dumps(content))
    return path


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_equal_written_out_arithmetic(whole: dict[str, Any]) -> None:
    row = summarise(whole).row("ekd", "small")
    assert row is not None
    assert row.n == 3
    assert row.mean == pytest.approx((0.551 + 0.549 + 0.553) / 3)
    assert row.std == pytest.approx(math.sqrt((0.0**2 + 0.002**2 + 0.002**2) / 2))
    differences = (0.551 - 0.530, 0.549 - 0.526, 0.553 - 0.527)
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    margin = 4.302652729911275 * deviation / math.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5 %, from a table
    assert row.difference is not None
    assert row.difference.values == pytest.approx(differences)
    assert row.difference.mean == pytest.approx(0.0233333, abs=1e-7)
    assert (row.difference.low, row.difference.high) == pytest.approx((mean - margin, mean + margin))
    assert row.difference.low == pytest.approx(0.0170817, abs=1e-7)


def test_pairs_are_the_seeds_finished_in_both() -> None:
    alone = method(small=[0.50, None, 0.52, 0.53])
    ekd = method(small=[0.51, 0.90, None, 0.57])
    row = summarise(comparison({"ekd": ekd, "alone": alone}, seeds=(3, 4, 5, 6))).row("ekd", "small")
    assert row is not None
    assert row.difference is not None
    assert row.n == 3
    assert row.difference.values == pytest.approx((0.01, 0.04))
    margin = 12.706204736432095 * math.sqrt(0.015**2 * 2) / math.sqrt(2)  # 1 degree of freedom
    assert (row.difference.low, row.difference.high) == pytest.approx((0.025 - margin, 0.025 + margin))
    assert row.difference.direction == 0


def test_alone_is_not_compared_with_itself_and_costs_one(whole: dict[str, Any]) -> None:
    summary = summarise(whole)
    assert all(row.difference is None for row in summary.rows if row.method == "alone")
    by_method = {found.method: found.relative for found in summary.costs}
    assert by_method["alone"] == {"seconds": 1.0, "cpu_seconds": 1.0, "macs_per_step": 1.0, "peak_memory_mb": 1.0}
    assert by_method["ekd"]["seconds"] == pytest.approx(0.72)


def test_order_of_methods_and_options_beyond_the_known() -> None:
    names = ["my-option", "adaptive-depth", "joint", "alone", "another", "ekd"]
    found = summarise(comparison({name: method(small=[0.5, 0.5, 0.5]) for name in names}))
    assert found.methods == ["ekd", "alone", "joint", "adaptive-depth", "my-option", "another"]
    assert style("my-option", found.methods) != style("another", found.methods)


def test_equal_accuracies_show_no_difference() -> None:
    same = method(small=[0.5, 0.6, 0.7])
    row = summarise(comparison({"ekd": same, "alone": same})).row("ekd", "small")
    assert row is not None
    assert row.difference is not None
    assert (row.difference.mean, row.difference.direction) == (0.0, 0)


def test_seeds_that_differ_by_as_many_images_prove_nothing_of_few_images() -> None:
    alone, ekd = method(small=[0.50, 0.52]), method(small=[0.51, 0.53])
    for test_images, direction in ((100, 0), (10_000, 1)):
        summary = summarise(comparison({"ekd": ekd, "alone": alone}, seeds=[0, 1], test_images=test_images))
        row = summary.row("ekd", "small")
        assert row is not None
        assert row.difference is not None
        assert row.difference.direction == direction


# -- words ------------------------------------------------------------------------------------------------------------


def test_verdicts_above_below_and_no_difference() -> None:
    alone = method(100.0, a=[0.50, 0.51, 0.52], b=[0.50, 0.51, 0.52], c=[0.50, 0.51, 0.52])
    ekd = method(72.0, a=[0.52, 0.53, 0.541], b=[0.48, 0.49, 0.501], c=[0.51, 0.50, 0.52])
    summary = summarise(comparison({"ekd": ekd, "alone": alone}, nets={}))
    above, below, same = verdicts(summary)
    assert (above.kind, below.kind, same.kind) == ("above", "below", "same")
    assert above.text == "DDNN-EKD is 2.03 points above alone (95% CI +1.89 to +2.18, 3 seeds)"
    assert below.text == f"DDNN-EKD is 1.97 points below alone (95% CI {MINUS}2.11 to {MINUS}1.82, 3 seeds)"
    assert str(same).startswith("c (full-net): no difference shown between DDNN-EKD and alone (+0.00 points, 95% CI")
    assert (
        headline(summary) == "DDNN-EKD is above alone on 1 of 3 nets, is below alone on 1 and shows no difference on 1."
    )
    assert price(summary) == (
        f"Price: DDNN-EKD took 0.72{TIMES} the wall-clock time, 0.72{TIMES} the processor time, "
        f"0.72{TIMES} the MACs and 0.72{TIMES} the peak memory of training every depth alone."
    )


def test_epochs_that_differ_between_methods_are_said() -> None:
    first = "All nets together have 18 epochs; in the first 9 of them the full-net learns by itself, and then"
    alone = "A net alone has 12 epochs, all nets together 18."
    rows = {"ekd": EKD, "alone": ALONE}
    both = markdown(comparison(rows, epochs=18, full_net_epochs=9, alone_epochs=12))
    assert first in both
    assert alone in both
    fewer = markdown(comparison(rows, epochs=18, alone_epochs=12))
    assert "by itself" not in fewer
    assert alone in fewer
    assert "A net alone has" not in markdown(comparison(rows, epochs=18, alone_epochs=18))


def test_the_claim_is_shown_for_whoever_holds_it() -> None:
    alone = method(100.0, small=[0.50, 0.51, 0.52], big=[0.60, 0.61, 0.62])
    lossy = method(80.0, small=[0.52, 0.53, 0.541], big=[0.58, 0.59, 0.601])
    unsure = method(80.0, small=[0.49, 0.52, 0.56], big=[0.60, 0.61, 0.62])
    good = method(148.0, small=[0.52, 0.53, 0.541], big=[0.6005, 0.6106, 0.6204])
    rows = {"ekd": lossy, "alone": alone, "joint": unsure}
    shown = "The claim (every sub-net above alone, the full-net not below it) is shown for"
    assert claim(summarise(comparison(rows))) == f"{shown} no method here."
    content = comparison({**rows, "ekd-pretrained": good})
    assert claim(summarise(content)) == f"{shown} frozen-teacher EKD (1.48{TIMES} the MACs)."
    assert f"- {shown} frozen-teacher EKD" in markdown(content)
    # a full-net whose interval reaches 0 only because seeds scatter does not keep its accuracy
    scattered = method(148.0, small=[0.52, 0.53, 0.541], big=[0.57, 0.62, 0.60])
    assert claim(summarise(comparison({"alone": alone, "ekd": scattered}))) == f"{shown} no method here."
    # nor does it, or lose it, where its mean is level and its interval is wide
    wide = method(148.0, small=[0.52, 0.53, 0.541], big=[0.59, 0.62, 0.62])
    assert claim(summarise(comparison({"alone": alone, "ekd": wide}))) == (
        f"{shown} no method here; for DDNN-EKD (1.48{TIMES} the MACs) the sub-nets are above alone, and the full-net's "
        "interval leaves it open."
    )
    once = {"alone": method(small=[0.4], big=[0.5]), "ekd": method(small=[0.5], big=[0.6])}
    assert claim(summarise(comparison(once, seeds=[0]))) is None


def test_what_a_term_earns_is_said_and_what_it_costs() -> None:
    without = method(small=[0.541, 0.540, 0.542], big=[0.641, 0.640, 0.642])
    level = method(small=[0.550, 0.552, 0.551], big=[0.629, 0.635, 0.626])
    better = method(small=[0.571, 0.569, 0.573], big=[0.650, 0.652, 0.648])
    said = earnings(summarise(comparison({"ekd": EKD, "joint": without, "kl": level, "attention": better})))
    assert said == [
        "Distillation helps small and costs big (DDNN-EKD less joint (cross-entropy only): "
        f"small +1.00, CI +0.75 to +1.25; big {MINUS}1.10, CI {MINUS}1.85 to {MINUS}0.35).",
        "KL does not earn its place here: it costs small and big (DDNN-EKD less attention only: "
        f"small {MINUS}2.00, CI {MINUS}2.01 to {MINUS}1.99; big {MINUS}2.00, CI {MINUS}2.01 to {MINUS}1.99).",
        "Attention does not earn its place here: no net is shown to gain (DDNN-EKD less KL only: "
        f"small +0.00, CI {MINUS}0.66 to +0.66; big +0.00, CI {MINUS}0.66 to +0.66).",
    ]
    few = method(small=[0.52, 0.58, 0.55], big=[0.60, 0.66, 0.63])
    assert earnings(summarise(comparison({"ekd": EKD, "kl": few})))[0].startswith(
        "Attention is not shown to help any net"
    )
    assert earnings(summarise(comparison({"ekd": EKD, "alone": ALONE}))) == []
    one = method(small=[0.5, None, None], big=[0.5, None, None])
    assert earnings(summarise(comparison({"ekd": EKD, "joint": one}))) == []


def test_a_better_rival_is_named(whole: dict[str, Any]) -> None:
    # of as many seeds as the others: a mean of two would not be the highest
    whole["methods"]["kl"] = method(70.0, small=[0.520, 0.519, 0.518], big=[0.640, 0.6405, 0.641])
    small, big = verdicts(summarise(whole))
    assert small.best is None
    assert big.best == "Highest mean: KL only, 64.05%"


def test_a_mean_of_fewer_seeds_is_not_the_highest() -> None:
    rows = {"ekd": method(small=[0.50, 0.52, 0.51]), "kl": method(small=[0.60, None, None])}
    best = summarise(comparison({**rows, "alone": method(small=[0.40, 0.42, 0.41])})).best("small")
    assert best is not None
    assert best.method == "ekd"


@pytest.mark.parametrize(("value", "shown"), [(0.021, "+2.10"), (-0.021, f"{MINUS}2.10"), (-1e-9, "+0.00")])
def test_points_have_a_sign(value: float, shown: str) -> None:
    assert points(value) == shown


def test_one_seed_proves_nothing() -> None:
    content = comparison({"ekd": method(small=[0.56]), "alone": method(small=[0.53])}, seeds=[7])
    summary = summarise(content)
    row = summary.row("ekd", "small")
    assert row is not None
    assert row.difference is not None
    assert (row.std, row.difference.low, row.difference.direction) == (None, None, None)
    assert row.difference.mean == pytest.approx(0.03)
    assert "proves nothing" in verdicts(summary)[0].text
    assert "proves nothing" in headline(summary)
    text = markdown(content)
    assert "| 56.00" in text.replace("**", "")
    assert "±" not in text
    assert "CI +" not in text


def test_what_is_missing_is_said() -> None:
    late = {"ekd": method(None, small=[0.55, 0.54, None], big=[0.6, 0.6, None]), "kl": KL}
    content = comparison(late)
    assert missing(summarise(content)) == [
        "Not part of this comparison: alone, joint (cross-entropy only), attention only, two-model KD, "
        "frozen-teacher EKD, adaptive-depth objective.",
        "Without nets trained alone there are no paired differences and no relative costs.",
        "Not finished: DDNN-EKD (seed 2); KL only (seed 1 of big).",
    ]
    assert verdicts(summarise(content))[0].text == "no verdict, alone missing"
    assert headline(summarise(content)) == "No verdict: this comparison is without alone."
    none = [None, None, None]
    begun = comparison({name: method(None, small=none, big=none) for name in ("ekd", "alone")})
    assert "No verdict yet" in headline(summarise(begun))
    assert "not known" in price(summarise(content))
    text = markdown(content)
    assert "2 of 3 seeds" in text
    assert "Not finished: DDNN-EKD" in text


def test_nothing_finished_yet(tmp_path: Path) -> None:
    nothing = method(None, small=[None, None, None], big=[None, None, None])
    content = comparison({"ekd": nothing, "alone": nothing}, nets={})
    for absent in ("machine", "versions", "test_images", "commit"):
        del content[absent]
    assert summarise(content).nets == ["small", "big"]
    assert "MACs and latency not measured yet: small, big." in missing(summarise(content))
    paths = write([folder_of(tmp_path / "begun", content)], tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "report.html"]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_markdown_table_in_points_with_two_decimals(whole: dict[str, Any]) -> None:
    text = markdown(whole)
    assert "| **DDNN-EKD** | **55.10 ± 0.20** (+2.33, CI +1.71 to +2.96) |" in text
    assert "| alone | 52.77 ± 0.21 | 63.00 ± 0.10 |" in text
    assert "| KL only |" in text
    assert "2 of 3 seeds" in text
    assert f"| **DDNN-EKD** | 72.0 s (0.72{TIMES}) | 2.4 min (0.72{TIMES}) | 72.0 G (0.72{TIMES}) | 360 MB" in text
    assert "| small | 1-1-1 | 83.9 k | 12.5 M | 0.70 ms |" in text


def test_names_cannot_break_a_markdown_table() -> None:
    text = markdown(comparison({"a|b<i>": method(small=[0.5, 0.5, 0.5])}))
    assert r"| a\|b\<i> | **50.00" in text


# -- figures ----------------------------------------------------------------------------------------------------------


def bars(axes: Any) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def segment_lengths(container: ErrorbarContainer) -> list[float]:
    return [float(end[1] - start[1]) for start, end in container.lines[2][0].get_segments()]


def test_accuracy_figure_has_one_curve_per_method_with_std_bars(whole: dict[str, Any]) -> None:
    summary = summarise(whole)
    figure = accuracy(summary, "macs")
    assert figure is not None
    (axes,) = figure.axes
    found = bars(axes)
    assert list(found) == ["DDNN-EKD", "alone", "KL only"]
    line = found["DDNN-EKD"].lines[0]
    assert list(line.get_xdata()) == pytest.approx([12.5, 40.9])
    assert list(line.get_ydata()) == pytest.approx([55.1, 63.0])
    assert segment_lengths(found["DDNN-EKD"]) == pytest.approx([0.4, 0.4])  # mean - std to mean + std
    assert line.get_linewidth() > found["alone"].lines[0].get_linewidth() > found["KL only"].lines[0].get_linewidth()
    assert axes.get_xlabel() == "MACs per image (M)"
    assert axes.get_ylabel() == "top-1 accuracy on the test images (%)"
    assert [text.get_text() for text in axes.texts] == ["small", "big"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(found)
    by_latency = accuracy(summary, "latency_ms")
    assert by_latency is not None
    assert by_latency.axes[0].get_xlabel() == "latency of one image (ms)"
    assert list(bars(by_latency.axes[0])["DDNN-EKD"].lines[0].get_xdata()) == pytest.approx([0.7, 1.6])


def test_one_seed_has_no_error_bars() -> None:
    summary = summarise(comparison({"ekd": method(small=[0.56], big=[0.6])}, seeds=[0]))
    figure = accuracy(summary, "macs")
    assert figure is not None
    assert not bars(figure.axes[0])["DDNN-EKD"].has_yerr
    assert difference(summary) is None
    assert cost(summary) is None


def test_names_of_nets_of_like_latency_do_not_overlap() -> None:
    nets = {
        f"a-net-of-{n}": {"depths": [n], "params": 1, "macs": n * 1e9, "latency_ms": 5 + 0.01 * n} for n in (1, 2, 9)
    }
    summary = summarise(comparison({"ekd": method(**{net: [0.5, 0.6, 0.7] for net in nets})}, nets=nets))
    for against, unit in (("latency_ms", "(ms)"), ("macs", "(G)")):
        figure = accuracy(summary, against)  # type: ignore[arg-type]
        assert figure is not None
        assert unit in figure.axes[0].get_xlabel()
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the leading line
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_difference_figure_shows_intervals(whole: dict[str, Any]) -> None:
    figure = difference(summarise(whole))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["small", "big"]
    small = figure.axes[0]
    assert [tick.get_text() for tick in small.get_yticklabels()] == ["DDNN-EKD", "KL only"]
    ends = [list(line.get_xdata()) for line in small.lines]
    assert pytest.approx([1.70817, 2.95850], abs=1e-4) in ends
    assert pytest.approx([2.33333], abs=1e-4) in ends


def test_cost_figure_is_relative_to_alone(whole: dict[str, Any]) -> None:
    figure = cost(summarise(whole))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["processor time", "MACs", "peak memory"]
    for axes in figure.axes:
        assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.72, 1.0, 0.7])
        assert [text.get_text() for text in axes.texts] == [f"{r}{TIMES}" for r in ("0.72", "1.00", "0.70")]


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({"machine": "NVIDIA H100"}, "wall-clock time"),  # a processor only launches work there
        ({"machine": "CPU, 1 thread; NVIDIA H100", "machines": ["CPU, 1 thread", "NVIDIA H100"]}, "wall-clock time"),
        ({"machine": "CPU, 1 thread; CPU, 2 threads"}, "processor time"),
        ({"machine": None}, "processor time"),
    ],
)
def test_cost_figure_shows_the_time_that_counts(whole: dict[str, Any], about: dict[str, Any], shown: str) -> None:
    figure = cost(summarise(whole | about))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [shown, "MACs", "peak memory"]


def test_a_cost_not_known_is_no_bar_of_zero(whole: dict[str, Any]) -> None:
    whole["methods"]["ekd"]["peak_memory_mb"] = None
    figure = cost(summarise(whole))
    assert figure is not None
    assert figure.axes[2].texts[0].get_text() == "not known"


def test_learning_figure_has_a_panel_per_net_and_a_line_per_method(whole: dict[str, Any]) -> None:
    curves = {("ekd", "small"): [0.1, 0.2], ("alone", "small"): [0.1, 0.15], ("ekd", "big"): [0.2, 0.3]}
    figure = learning(summarise(whole), curves, "training")
    assert figure is not None
    small, big = figure.axes
    assert {line.get_label(): list(line.get_ydata()) for line in small.lines} == {
        "DDNN-EKD": pytest.approx([10.0, 20.0]),
        "alone": pytest.approx([10.0, 15.0]),
    }
    assert list(small.lines[0].get_xdata()) == [1, 2]
    assert [line.get_label() for line in big.lines] == ["DDNN-EKD"]
    assert small.get_xlabel() == "epoch"
    assert figure.get_supylabel() == "top-1 on training images (%)"
    assert learning(summarise(whole), {}, "validation") is None


def test_known_methods_differ_in_colour_and_in_grey() -> None:
    for what in ("color", "linestyle", "marker"):
        assert len({str(look[what]) for look in STYLES.values()}) == len(STYLES)


def test_drawing_changes_no_setting_and_repeats_itself(whole: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    first, again = (draw_all(summarise(whole), Curves()) for _ in range(2))
    assert dict(matplotlib.rcParams) == before
    assert [(d.svg, d.png) for d in first] == [(d.svg, d.png) for d in again]


def test_curves_are_the_mean_over_finished_seeds(tmp_path: Path) -> None:
    content = comparison({"ekd": method(small=[0.5, 0.5, None], big=[0.5, 0.5, None]), "alone": ALONE})
    folder = folder_of(tmp_path / "fair", content, epochs=3)
    run = RunFolder.open(folder / "runs" / "ekd-seed1")
    run.write_metrics([{**epoch, "validation": {"small": {"top1": 0.4, "top5": 0.6}}} for epoch in run.metrics()])
    found = read_curves(folder, parse(content))
    assert found.train["ekd", "small"] == pytest.approx([0.105, 0.205, 0.305])  # seeds 0 and 1
    assert found.train["alone", "big"] == pytest.approx([0.11, 0.21, 0.31])
    assert found.validation == {("ekd", "small"): pytest.approx([0.4, 0.4, 0.4])}
    assert not found.unreadable
    (folder / "runs" / "alone-big-seed2" / "recipe.toml").unlink()
    found = read_curves(folder, parse(content))
    assert found.train["alone", "big"] == pytest.approx([0.105, 0.205, 0.305])
    assert found.unreadable == ["alone-big-seed2"]
    assert any("alone-big-seed2" in sentence for sentence in missing(summarise(content), found))


def test_curves_begin_with_the_full_net_that_was_first(tmp_path: Path) -> None:
    content = comparison({"ekd": method(small=[0.5], big=[0.6]), "alone": method(small=[0.4], big=[0.6])}, seeds=[0])
    folder = folder_of(tmp_path / "fair", content, epochs=2)
    started = recipe.changed(recipe.load("digits"), network={"weights": Path("../alone-big-seed0")})
    (folder / "runs" / "ekd-seed0" / "recipe.toml").write_text(started.to_toml())
    found = read_curves(folder, parse(content))
    assert found.train["ekd", "big"] == pytest.approx([0.1, 0.2, 0.1, 0.2])
    assert found.train["ekd", "small"] == pytest.approx([math.nan, math.nan, 0.1, 0.2], nan_ok=True)
    figure = learning(summarise(content), found.train, "training")
    assert figure is not None
    assert all(map(math.isfinite, figure.axes[0].get_ylim()))
    # a run elsewhere, of which the comparison knows nothing
    elsewhere = recipe.changed(started, network={"weights": folder / "runs" / "alone-big-seed0"})
    (folder / "runs" / "ekd-seed0" / "recipe.toml").write_text(elsewhere.to_toml())
    assert read_curves(folder, parse(content)).train["ekd", "big"] == pytest.approx([0.1, 0.2])


def test_a_net_has_no_curve_before_it_joins(tmp_path: Path) -> None:
    content = comparison({"ekd": method(small=[0.5], big=[0.6])}, seeds=[0])
    folder = folder_of(tmp_path / "fair", content, epochs=2)
    run = RunFolder.open(folder / "runs" / "ekd-seed0")
    first, last = run.metrics()
    del first["train_top1"]["small"]
    run.write_metrics([first, last])
    found = read_curves(folder, parse(content))
    assert found.train["ekd", "big"] == pytest.approx([0.1, 0.2])
    assert found.train["ekd", "small"] == pytest.approx([math.nan, 0.2], nan_ok=True)


# -- files ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page refers to, its ids and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.links += [found for _, value in attrs for found in re.findall(r"url\(([^)]*)\)", value or "")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_needs_nothing_else(tmp_path: Path, whole: dict[str, Any]) -> None:
    paths = write([folder_of(tmp_path / "fair", whole, epochs=3)], tmp_path / "out")
    assert [path.name for path in paths[:2]] == ["report.md", "report.html"]
    names = ["accuracy-latency", "accuracy-macs", "cost", "difference", "training"]
    figures = {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    assert {path.name for path in paths[2:]} == figures == {path.name for path in (tmp_path / "out/figures").iterdir()}
    text = paths[1].read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == len(names)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert "DDNN-EKD is 2.33 points above alone" in page.words
    assert page.words.index("is above alone on 1 of 2 nets") < page.words.index("55.10")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", paths[0].read_text(encoding="utf-8"))
    assert len(shown) == len(names)
    assert all((tmp_path / "out" / path).is_file() for path in shown)
    for path in paths[2:]:
        if path.suffix == ".svg":
            ET.fromstring(path.read_text(encoding="utf-8"))
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, None),
        ({"machines": ["CPU, 1 thread"]}, None),
        (
            {"machines": ["CPU, 1 thread", "H100"]},
            "ran on 2 kinds of machine: times, peak memory and latencies are not",
        ),
        ({"versions": {"python": "3.12", "torch": "2.9, 2.10"}}, "ran on several versions of torch: times, peak"),
    ],
)
def test_machines_and_versions_that_differ_are_said(tmp_path: Path, about: dict[str, Any], said: str | None) -> None:
    folder = folder_of(tmp_path / "fair", comparison({"alone": ALONE, "ekd": EKD}, **about))
    write([folder], tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = " ".join((tmp_path / "out" / name).read_text().split())
        assert said in text if said else "not comparable" not in text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$x$ & \"y\"')</script>"
    content = comparison({evil: method(**{evil: [0.5, 0.6, 0.7]}), "alone": method(**{evil: [0.5, 0.5, 0.6]})})
    content |= {"nets": {evil: content["nets"]["small"]}, "dataset": evil, "machine": evil, "versions": {evil: evil}}
    paths = write([folder_of(tmp_path / "fair", content)], tmp_path / "out")
    page = Page(paths[1].read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert evil in page.words
    for path in paths:
        if path.suffix == ".svg":
            ET.fromstring(path.read_text(encoding="utf-8"))


def test_many_comparisons_have_contents_and_sections(tmp_path: Path, whole: dict[str, Any]) -> None:
    second = comparison({"ekd": EKD, "alone": ALONE}, dataset="digits")
    folders = [folder_of(tmp_path / "a" / "fair", whole), folder_of(tmp_path / "b" / "fair", second)]
    paths = write(folders, tmp_path / "out")
    text = paths[1].read_text(encoding="utf-8")
    page = Page(text)
    assert {"#fair", "#fair-2"} <= set(page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert text.index("<nav") < text.index('<section id="fair">') < text.index('<section id="fair-2">')
    assert "digits: small, big" in page.words
    assert (tmp_path / "out/figures/fair-cost.svg").is_file()
    assert (tmp_path / "out/figures/fair-2-cost.svg").is_file()
    table = paths[0].read_text(encoding="utf-8")
    assert "- [digits: small, big](#fair-2): DDNN-EKD is above alone on 1 of 2 nets" in table
    assert "(figures/fair-2-cost.svg)" in table


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_comparison(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere is no comparison: it has no comparison\.json"):
        write([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(RunError, match="name the folder of one"):
        write([], tmp_path / "out")


def test_a_damaged_comparison_leaves_nothing_written(tmp_path: Path, whole: dict[str, Any]) -> None:
    good, bad = folder_of(tmp_path / "good", whole), tmp_path / "bad"
    bad.mkdir()
    (bad / "comparison.json").write_text('{"dataset": "cif')
    with pytest.raises(RunError, match=r"comparison\.json is damaged and cannot be read"):
        write([good, bad], tmp_path / "out")
    (bad / "comparison.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RunError, match=r"comparison\.json is damaged and cannot be read"):
        write([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("seeds"), "seeds: is missing"),
        (lambda c: c["methods"]["ekd"].pop("subnets"), r"methods\.ekd\.subnets: is missing"),
        (lambda c: c["nets"]["small"].pop("macs"), r"nets\.small\.macs: is missing"),
        (lambda c: c["methods"].clear(), "has no methods, so there is nothing to compare"),
        (lambda c: c["seeds"].append(3), "ekd has 3 accuracies of small for 4 seeds"),
        (lambda c: c["methods"]["ekd"]["subnets"].update(small=[55.1, 0.5, 0.5]), "less than or equal to 1"),
        (lambda c: c["methods"]["ekd"]["subnets"].update(small=[math.nan, 0.5, 0.5]), "methods.ekd.subnets.small.0"),
    ],
)
def test_a_comparison_that_cannot_be_used(change: Any, says: str) -> None:
    content = json.loads(json.dumps(comparison({"ekd": EKD, "alone": ALONE})))
    change(content)
    with pytest.raises(RunError, match=says) as caught:
        summarise(content)
    assert "\n" not in str(caught.value)


def test_a_comparison_that_is_no_object() -> None:
    with pytest.raises(RunError, match="cannot be used"):
        markdown([])  # type: ignore[arg-type]
