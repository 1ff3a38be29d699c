"""The cascade: what it answers, that nothing is computed twice, and how its thresholds are chosen."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import bundles
import ddnn
from ddnn.errors import BudgetError, BundleError, RequestError
from ddnn.runtime import curve as curves
from ddnn.runtime import graphs, heldout, sentences, tables, thresholds, tuning
from ddnn.runtime.cascade import NEVER, UNREACHED, confidence, probabilities
from ddnn.runtime.curve import Curve, Point, Took
from ddnn.runtime.machine import this_machine
from ddnn.runtime.thresholds import Costs, Seen
from ddnn.timing import time_round

NETS = list(bundles.PATHS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.make(tmp_path_factory.mktemp("bundles") / "bundle")


def by_hand(images: np.ndarray, given: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Each image by itself: the first net whose confidence reaches its threshold answers."""
    logits, answered = [], []
    for image in images:
        for k, name in enumerate(NETS):
            found = bundles.reference(name, image[None])[0]
            sure = (np.exp(found) / np.exp(found).sum()).max()
            if k == len(NETS) - 1 or sure >= given[k]:
                logits.append(found)
                answered.append(k)
                break
    return np.array(logits), np.array(answered)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "given", [0.0, 0.6, 0.9, [0.99, 0.5], [0.3, NEVER], [NEVER, 0.0], NEVER, UNREACHED, [NEVER, 0.9], 1.0]
)
def test_a_cascade_answers_as_written_out(bundle: Path, given: Any, shared: bool) -> None:
    model = ddnn.load(bundle, shared=shared)
    images = bundles.normalised(23, seed=3)
    expected, answered = by_hand(images, given if isinstance(given, list) else [given] * 2)
    found = model.cascade(images, given)
    assert list(found.answered) == list(answered)
    assert np.abs(found.logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_these_images_tell_the_cases_apart(bundle: Path) -> None:
    _, answered = by_hand(bundles.normalised(23, seed=3), [0.9, 0.9])
    assert min(Counter(answered).values()) >= 2
    assert len(set(answered)) == 3


def test_a_batch_is_its_images_one_by_one(bundle: Path) -> None:
    model = ddnn.load(bundle, threads=1)
    images = bundles.normalised(12, seed=4)
    whole = model.cascade(images, 0.8)
    for i, image in enumerate(images):
        alone = model.cascade(image[None], 0.8)
        assert alone.answered[0] == whole.answered[i]
        assert np.abs(alone.logits[0] - whole.logits[i]).max() < 1e-5


def test_thresholds_may_be_numbers_of_numpy(bundle: Path) -> None:
    model, images = ddnn.load(bundle), bundles.normalised(9, seed=3)
    for same in (
        (0, np.int64(0), np.array(0), np.float32(0), [np.int64(0), np.array(0.0)], np.zeros(2)),
        (0.5, np.float64(0.5), np.array(0.5), (0.5, np.float32(0.5)), np.array([0.5, 0.5])),
    ):
        answers = [model.cascade(images, given) for given in same]
        assert all(list(each.answered) == list(answers[0].answered) for each in answers)
    for wrong in (None, object(), [None, 0.5], "ab", [[0.5], [0.5]]):
        with pytest.raises(RequestError, match="is no threshold; allowed is a probability"):
            model.cascade(images, wrong)  # type: ignore[arg-type]


def test_nothing_is_computed_twice(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of a cascade hold every block of the tree of paths once, and run on the unsure images alone."""
    convolutions = Counter()
    for name in NETS:
        graph = onnx.load(bundle / f"{name}.cascade.onnx", load_external_data=False).graph
        norms = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "BatchNormalization"}
        for node in graph.node:
            if node.op_type == "Conv":
                convolutions[node.input[1], norms.get(node.output[0])] += 1
    blocks = {(conv, f"{norm}.scale") for path in bundles.PATHS.values() for conv, norm in path}
    assert convolutions == Counter([("stem", None), *blocks])

    model = ddnn.load(bundle)
    ran: list[tuple[str, int]] = []
    run = model._sessions.run

    def watched(graph: str, outputs: Any, inputs: Any, **how: Any) -> Any:
        ran.append((graph, len(next(iter(inputs.values())))))
        return run(graph, outputs, inputs, **how)

    monkeypatch.setattr(model._sessions, "run", watched)
    images = bundles.normalised(23, seed=3)
    answered = model.cascade(images, 0.9).answered
    left = [23, int((answered > 0).sum()), int((answered > 1).sum())]
    assert ran == [(f"{name}.cascade.onnx", count) for name, count in zip(NETS, left, strict=True)]
    ran.clear()
    model.cascade(images, 0.0)
    assert ran == [("small.cascade.onnx", 23)]


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_net_left_out_runs_no_more_than_others_need(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """In all, a cascade of the deepest alone is the deepest alone: its convolutions, each once."""
    model = ddnn.load(bundle, shared=shared)
    cut: list[onnx.ModelProto] = []
    original = graphs.cut_to

    def watched(graph: bytes, outputs: Any) -> bytes:
        made = original(graph, outputs)
        cut.append(onnx.load_model_from_string(made))
        return made

    monkeypatch.setattr(graphs, "cut_to", watched)
    images = bundles.normalised(5)
    expected = bundles.reference("large", images)
    assert np.abs(model.cascade(images, NEVER).logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert [[output.name for output in model.graph.output] for model in cut] == [["f0"], ["f1"]]
    if not shared:
        blocks = [sum(node.op_type == "Conv" for node in model.graph.node) for model in cut]
        rest = onnx.load(bundle / "large.cascade.onnx", load_external_data=False).graph.node
        assert [*blocks, sum(node.op_type == "Conv" for node in rest)] == [1, 1, 2]


def test_a_graph_is_cut_to_what_its_outputs_need(bundle: Path) -> None:
    whole = (bundle / "small.cascade.onnx").read_bytes()
    model = onnx.load_model_from_string(graphs.cut_to(whole, ["f0"]))
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    both = onnx.load_model_from_string(graphs.cut_to(whole, ["logits", "f0"]))
    assert both == onnx.load_model_from_string(whole)  # whatever it does not read stays


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([0.5], "1 thresholds are given; allowed are one for all, or one for each of: small, middle"),
        ([0.5] * 3, "3 thresholds are given"),
        (-0.1, "-0.1 is no threshold; allowed is a probability"),
        (float("nan"), "nan is no threshold"),
        (["a", "b"], "'a' is no threshold"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(bundle: Path, given: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        ddnn.load(bundle).cascade(bundles.normalised(1), given)


def test_confidence_is_the_probability_of_the_most_likely_class() -> None:
    logits = np.array([[1, 2, 3], [1000, 0, -1000], [5, 5, 5]], dtype=np.float32)
    expected = np.exp(logits[0].astype(float)) / np.exp(logits[0].astype(float)).sum()
    assert probabilities(logits)[0] == pytest.approx(expected)
    assert confidence(logits) == pytest.approx([expected.max(), 1, 1 / 3])
    assert probabilities(logits).sum(1) == pytest.approx([1, 1, 1])


# ---- choosing thresholds


def made_up(n: int, nets: int, seed: int) -> Seen:
    """Nets that are right about as often as they are sure."""
    random = np.random.default_rng(seed)
    sure = np.sort(random.uniform(0.2, 1, (n, nets)), axis=1)
    return Seen(sure, random.uniform(size=(n, nets)) < sure)


def stops(seen: Seen, given: tuple[float, ...]) -> list[int]:
    """Written out."""
    found = []
    for row in seen.confidence:
        k = 0
        while k < len(given) and row[k] < given[k]:
            k += 1
        found.append(k)
    return found


def test_outcome_is_the_loop_written_out() -> None:
    seen, costs = made_up(50, 4, 0), Costs([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 4.0])
    for given in itertools.product([0.0, 0.5, 0.8, UNREACHED, NEVER], repeat=3):
        where = stops(seen, given)
        result = thresholds.outcome(seen, costs, given)
        assert result.accuracy == np.mean([seen.right[i, k] for i, k in enumerate(where)])
        spent = [left_out if t == NEVER else asked for asked, left_out, t in zip(*costs, (*given, 0), strict=True)]
        assert result.cost == pytest.approx(np.mean([sum(spent[: k + 1]) for k in where]))
        assert result.share == tuple(where.count(k) / 50 for k in range(4))


@pytest.mark.parametrize("price", [0.0, 0.5, 2.0, 10.0, 1e6])
def test_the_best_threshold_of_two_nets_is_the_best_of_all(price: float) -> None:
    """With one threshold, an exhaustive search over every cut there is."""
    for seed in range(5):
        seen, costs = made_up(40, 2, seed), Costs([1.0, 1.7], [0.2, 1.7])
        cuts = [0.0, NEVER, *seen.confidence[:, 0]]
        results = [thresholds.outcome(seen, costs, [cut]) for cut in cuts]
        least = min(result.cost + price * (1 - result.accuracy) for result in results)
        found = thresholds.outcome(seen, costs, thresholds.best(seen, costs, price))
        assert found.cost + price * (1 - found.accuracy) == pytest.approx(least)


def test_no_single_threshold_of_the_best_can_be_bettered() -> None:
    seen, costs, price = made_up(60, 3, 1), Costs([1.0, 1.5, 2.0], [0.1, 0.3, 2.0]), 6.0
    found = thresholds.best(seen, costs, price)

    def value(given: list[float]) -> float:
        result = thresholds.outcome(seen, costs, given)
        return result.cost + price * (1 - result.accuracy)

    for k in range(2):
        for cut in [0.0, NEVER, *seen.confidence[:, k]]:
            assert value(found) <= value([*found[:k], cut, *found[k + 1 :]]) + 1e-12


def test_the_curve_rises_from_the_shallowest_net() -> None:
    seen, costs = made_up(300, 3, 2), Costs([1.0, 1.5, 2.0], [0.5, 0.5, 2.0])
    front = thresholds.frontier(seen, costs)
    found = thresholds.curve(front, points=8)
    results = [thresholds.outcome(seen, costs, each) for each in found]
    assert 3 <= len(found) <= 8
    assert results[0].share == (1, 0, 0)
    for before, after in itertools.pairwise(results):
        assert after.cost > before.cost
        assert after.accuracy > before.accuracy
    every = [thresholds.outcome(seen, costs, each) for each in thresholds.curve(front, points=10**6)]
    assert every == [result for result, _ in front]
    assert results[-1] == every[-1]
    assert max(result.accuracy for result in every) >= max(seen.right.mean(0))


def test_the_cheapest_for_an_accuracy_reaches_it() -> None:
    seen, costs = made_up(300, 3, 3), Costs([1.0, 1.5, 2.0], [0.5, 0.5, 2.0])
    wanted = float(seen.right[:, 2].mean())
    front = thresholds.frontier(seen, costs)
    found = thresholds.cheapest(front, wanted)
    assert found is not None
    result = thresholds.outcome(seen, costs, found)
    assert result.accuracy >= wanted
    assert result.cost < sum(costs.asked)
    assert result.cost == min(other.cost for other, _ in front if other.accuracy >= wanted)
    assert thresholds.cheapest(front, 1.01) is None


def test_a_net_not_worth_asking_is_left_out() -> None:
    """The middle net knows nothing that the shallowest does not, and costs as much as the deepest."""
    random = np.random.default_rng(4)
    sure = random.uniform(0.2, 1, 400)
    right = random.uniform(size=400) < sure
    seen = Seen(np.stack([sure, sure, sure], 1), np.stack([right, right, np.ones(400, dtype=bool)], 1))
    costs = Costs([1.0, 5.0, 5.0], [0.1, 0.1, 5.0])
    for price in (6.0, 8.0, 10.0):
        first, second = thresholds.best(seen, costs, price)
        assert 0 < first < 1
        assert second == NEVER


def test_the_parts_cost_what_they_are_made_of(bundle: Path) -> None:
    """Multiply-accumulates, from the shapes of the small bundle; a net left out costs what deeper ones start from."""
    half = (bundles.SIZE // 2) ** 2
    stem, block = bundles.WIDTH * 27 * half, bundles.WIDTH**2 * 9 * half
    head = bundles.FEATURES * len(bundles.CLASSES)
    costs = tuning.part_macs(list(ddnn.load(bundle).nets.values()))
    assert costs.asked == [stem + block + head, 2 * block + head, 2 * block + head]
    assert costs.left_out == [stem, block, 0]


# ---- held-out images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """A folder of class folders whose images the full-net mostly knows, and an .npz of the same."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(8)
    pixels = random.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    logits = ddnn.load(bundle)(pixels)
    labels = np.where(random.uniform(size=160) < 0.85, logits.argmax(1), random.integers(0, 4, 160))
    for i, label in enumerate(labels):
        folder = root / "folder" / bundles.CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(folder / f"{i:03d}.png")
    np.savez(root / "held.npz", images=pixels, labels=labels)
    return root


def test_folders_and_arrays_hold_the_same(bundle: Path, photos: Path) -> None:
    manifest = ddnn.load(bundle).manifest
    folder, array = (heldout.read(photos / name, manifest, 1000) for name in ("folder", "held.npz"))
    assert len(folder) == len(array) == 160
    as_set = lambda held: {(p.tobytes(), int(t)) for p, t in zip(held.pixels, held.labels, strict=True)}  # noqa: E731
    assert as_set(folder) == as_set(array)
    first, second = folder.halves()
    assert len(first) == len(second) == 80
    assert as_set(first) | as_set(second) == as_set(folder)
    assert not as_set(first) & as_set(second)
    few = heldout.read(photos / "folder", manifest, 30)
    assert len(few) == 30
    assert few.about == f"30 of the 160 images in {photos / 'folder'}"


def test_unreadable_held_out_images_are_counted(bundle: Path, photos: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "folder"
    shutil.copytree(photos / "folder", copy)
    (copy / "ant" / "x.png").write_bytes(b"none")
    held = heldout.read(copy, ddnn.load(bundle).manifest, 1000)
    assert len(held) == 160
    assert held.unread.startswith("1 of 161 images in ")
    assert [half.unread for half in held.halves()] == [held.unread] * 2


def test_held_out_data_that_cannot_be_used_is_named(bundle: Path, tmp_path: Path) -> None:
    manifest = ddnn.load(bundle).manifest
    pixels, labels = np.zeros((30, 8, 8, 3), np.uint8), np.zeros(30, np.int64)
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange" / "elk").mkdir(parents=True)
    (tmp_path / "hollow" / "ant").mkdir(parents=True)
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "floats.npz", images=pixels.astype(np.float32), labels=labels)
    np.savez(tmp_path / "short.npz", images=pixels, labels=labels[:5])
    np.savez(tmp_path / "other.npz", images=pixels)
    np.savez(tmp_path / "many.npz", images=pixels, labels=labels + 4)
    np.savez(tmp_path / "objects.npz", images=pixels, labels=np.array([None] * 30))  # pickled
    for name, sentence in {
        "nowhere": "is no held-out data; allowed are a folder of class folders",
        "empty": "it has no class folders; allowed are folders named ant, bee, cat, dog",
        "strange": "its folder elk is no class of the bundle",
        "hollow": "its folders hold no images",
        "text.npz": "text.npz cannot be read: it is no .npz file",
        "floats.npz": r"images are float32 \[30, 8, 8, 3\]; allowed is uint8",
        "short.npz": r"labels are int64 \[5\]; allowed are whole numbers \[30\]",
        "other.npz": "cannot be read: .*labels",
        "many.npz": "labels must be numbers of the bundle's classes, 0 to 3",
        "objects.npz": "cannot be read: Object arrays cannot be loaded",
    }.items():
        with pytest.raises(RequestError, match=sentence):
            heldout.read(tmp_path / name, manifest, 100)


# ---- measuring


@pytest.fixture(scope="module")
def measured(bundle: Path, photos: Path) -> Curve:
    model = ddnn.load(bundle, threads=1)
    first, second = heldout.read(photos / "folder", model.manifest, 1000).halves()
    found = tuning.measure(model, first, second, [1, 4], accuracy=0.6, seconds=0)
    curves.write(found, model.manifest)
    return found


def test_the_measured_curve_is_that_of_the_cascade(bundle: Path, photos: Path, measured: Curve) -> None:
    model = ddnn.load(bundle)
    first, second = heldout.read(photos / "folder", model.manifest, 1000).halves()
    assert measured.nets == NETS
    assert measured.judged == 80
    for point in measured.points:
        for held, accuracy in ((first, point.chosen_on), (second, point.accuracy)):
            found = model.cascade(held.pixels, point.thresholds)
            assert accuracy == pytest.approx((found.logits.argmax(1) == held.labels).mean())
        assert point.share == pytest.approx([(found.answered == k).mean() for k in range(3)])
        assert set(point.took) == {1, 4}
        assert all(took.mean > 0 for took in point.took.values())
    for point, name in zip(measured.fixed, NETS, strict=True):
        right = model(second.pixels, name).argmax(1) == second.labels
        assert (point.name, point.accuracy) == (name, pytest.approx(right.mean()))
    seen = tuning.see(model, second)
    whole = thresholds.outcome(seen, tuning.part_macs(list(model.nets.values())), [NEVER, NEVER])
    assert whole.cost == model.nets["large"].macs  # as if it were alone: nothing is computed twice


def test_a_curve_is_kept_with_its_bundle_and_machine(bundle: Path, measured: Curve, tmp_path: Path) -> None:
    import shutil

    model = ddnn.load(bundle, threads=1)
    assert curves.read(model.manifest, this_machine()) == measured
    assert model.thresholds() == measured.points[measured.chosen].thresholds
    for other, sentence in (
        (ddnn.load(bundle, threads=3), "not measured with 3 threads but with 1 thread; .* --threads 3$"),
        (ddnn.load(bundle, threads=1, shared=True), "with 1 thread, shared weights but .* --threads 1 --shared$"),
        (ddnn.load(bundle, "large", threads=1), "a cascade needs all depths"),
    ):
        for wanted in ({}, {"accuracy": 0.1}, {"latency_ms": 1e6}):
            with pytest.raises(RequestError, match=sentence):
                other.thresholds(**wanted)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    path = next(copy.glob("machines/*/cascade.json"))
    whole = path.read_text()
    path.write_text("{")
    with pytest.raises(BundleError, match=r"cascade.json is damaged .*; remove it and measure again"):
        ddnn.load(copy).thresholds()
    changes: list[tuple[str, Any]] = [
        ("calls", {}), ("threads", None), ("shared", 1), ("chosen", 99), ("chosen", -1), ("busy", "x"), ("points", []),
        ("through", {}), ("points/0/took", {}), ("points/0/chosen_on", None), ("points/0/thresholds", [0.5]),
    ]  # fmt: skip
    changes += [(f"points/0/took/{batch}", [-1, 1]) for batch in measured.calls]
    for place, value in changes:
        content = json.loads(whole)
        *within, last = place.split("/")
        part = content
        for step in within:
            part = part[int(step)] if isinstance(part, list) else part[step]
        part[last] = value
        path.write_text(json.dumps(content))
        with pytest.raises(BundleError, match=r"cascade.json is damaged .*; remove it and measure again"):
            ddnn.load(copy).thresholds()
    path.write_text(json.dumps({"format": "ddnn-cascade", "version": 9}))
    with pytest.raises(BundleError, match="is of another format"):
        ddnn.load(copy).thresholds()
    path.unlink()
    with pytest.raises(RequestError, match="no thresholds measured on this machine; run: ddnn cascade"):
        ddnn.load(copy).thresholds()
    bundles.seal(bundle, source={"dataset": "newer"})
    try:
        with pytest.raises(RequestError, match="of another bundle that was here before"):
            ddnn.load(bundle).thresholds()
    finally:
        bundles.seal(bundle, source={})


def test_too_few_images_are_refused(bundle: Path, photos: Path) -> None:
    model = ddnn.load(bundle)
    held = heldout.read(photos / "held.npz", model.manifest, 18)
    with pytest.raises(RequestError, match="9 held-out images for thresholds to be chosen are too few"):
        tuning.measure(model, *held.halves(), [1], seconds=0)
    held = heldout.read(photos / "held.npz", model.manifest, 40)
    with pytest.raises(RequestError, match="batch sizes must be from 1 to the 20 images"):
        tuning.measure(model, *held.halves(), [21], seconds=0)
    with pytest.raises(RequestError, match="at least two depths"):
        tuning.measure(ddnn.load(bundle, "small"), *held.halves(), [1], seconds=0)


def test_prices_are_swept_once(bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an accuracy is wanted or not."""
    model = ddnn.load(bundle, threads=1)
    held = heldout.read(photos / "held.npz", model.manifest, 40)
    prices: list[float] = []
    best = thresholds.best
    monkeypatch.setattr(thresholds, "best", lambda seen, costs, price: prices.append(price) or best(seen, costs, price))
    tuning.measure(model, *held.halves(), [1], accuracy=0.5, seconds=0)
    assert prices
    assert len(set(prices)) == len(prices)


def test_depths_and_cascades_take_turns_in_ever_another_order(
    bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ddnn.load(bundle, threads=1)
    held = heldout.read(photos / "held.npz", model.manifest, 40)
    rounds: list[tuple[Any, ...]] = []

    def seen(calls: dict[Any, Callable[[], object]], chance: random.Random) -> dict[Any, float]:
        order: list[Any] = []
        called = {key: lambda key=key, call=call: (order.append(key), call()) for key, call in calls.items()}
        taken = time_round(called, chance)
        rounds.append(tuple(order))
        return taken

    monkeypatch.setattr(tuning, "time_round", seen)
    tuning.measure(model, *held.halves(), [2], seconds=0)
    assert len(rounds) == 1 + tuning.FEWEST, "one to know how long a round takes"
    assert {frozenset(order) for order in rounds} == {frozenset(rounds[0])}
    assert set(NETS) < set(rounds[0])
    assert len(set(rounds)) > tuning.FEWEST / 2


def test_rounds_in_which_the_machine_was_busy_do_not_count() -> None:
    assert list(tuning.undisturbed(np.array([1.0, 1.1, 0.9, 2.3, 1.9, 50.0]))) == [True, True, True, True, True, False]


# ---- what it means


def a_curve(ms: dict[int, list[float]], accuracies: list[float], cascade_ms: dict[int, list[float]]) -> Curve:
    """Three depths of accuracy 0.5, 0.6, 0.7 with these latencies, and cascades with theirs."""

    def point(name: str, given: list[float], accuracy: float, took: dict[int, float]) -> Point:
        times = {batch: Took(each, 2 * each) for batch, each in took.items()}
        return Point(name, given, accuracy + 0.01, accuracy, [0.5, 0.25, 0.25], 20.0, times)

    fixed = [point(n, [], 0.5 + 0.1 * k, {b: ms[b][k] for b in ms}) for k, n in enumerate(NETS)]
    points = [point("", [k / 9, 0.5], a, {b: cascade_ms[b][k] for b in ms}) for k, a in enumerate(accuracies)]
    return curves.choose(
        Curve(
            bundle="b" * 64,
            machine=this_machine(),
            measured="now",
            threads=1,
            shared=False,
            nets=NETS,
            images={"thresholds chosen on": "x", "judged by": "y"},
            judged=400,
            through={b: Took(2 * ms[b][-1], 3 * ms[b][-1]) for b in ms},
            calls=dict.fromkeys(ms, 20),
            busy=0.0,
            fixed=fixed,
            points=points,
        )
    )


MS = {1: [1.0, 2.0, 3.0], 8: [8.0, 16.0, 24.0]}
PAYS = a_curve(MS, [0.5, 0.62, 0.71], {1: [1.0, 1.5, 2.1], 8: [8.0, 14.0, 30.0]})
NOT = a_curve(MS, [0.5, 0.58, 0.69], {1: [1.0, 1.5, 2.9], 8: [8.0, 14.0, 30.0]})
EVEN = a_curve(MS, [0.5, 0.7], {1: [1.0, 2.95], 8: [8.0, 24.5]})


def test_where_it_pays_is_said(bundle: Path) -> None:
    manifest = ddnn.load(bundle).manifest
    assert sentences.headline(PAYS) == (
        "The cascade pays in some cases: as accurate as large alone in 30% less time, one image at a time; not in "
        "batches of 8"
    )
    assert sentences.verdicts(PAYS) == [
        ("above", "Batch 1: as accurate as large (70.00 %) in 2.1 ms on average, large alone 3 ms: 30% less"),
        ("below", "Batch 8: does not pay. As accurate as large takes 30 ms on average, large alone 24 ms"),
    ]
    assert [text.split(":")[0] for text in sentences.reasons(PAYS, manifest)][:2] == [
        "The paths part early",
        "Many images are unsure",
    ]
    assert "2.00 times large alone" in sentences.worst(PAYS)


def test_where_it_does_not_pay_is_said() -> None:
    assert sentences.headline(NOT).startswith("The cascade does not pay here: no thresholds are as accurate as large")
    assert sentences.verdicts(NOT)[0] == (
        "below",
        "Batch 1: does not pay. No thresholds are as accurate as large (70.00 %); the best reach 69.00 % in 2.9 ms, "
        "large alone 3 ms",
    )
    assert [kind for kind, _ in sentences.verdicts(EVEN)] == ["same", "same"]
    assert "makes no difference" in sentences.verdicts(EVEN)[0][1]
    shallow = a_curve(MS, [0.75], {1: [1.0], 8: [8.0]})
    shallow.fixed[0].__dict__["accuracy"] = 0.9
    assert "small, the shallowest net, is the most accurate already" in sentences.headline(shallow)


def test_a_quicker_depth_that_may_be_as_good_is_said() -> None:
    assert sentences.caveat(PAYS) is None  # 10 points apart on 400 images, a standard error is 2.3
    near = dataclasses.replace(PAYS, judged=20)
    assert sentences.caveat(near) == (
        "middle alone, 60.00 % in 2 ms at batch 1, is within one standard error (10.2 points) of large: on 20 images "
        "the difference may be chance"
    )


def test_points_are_chosen_for_what_is_wanted() -> None:
    assert curves.choose(PAYS).chosen == 2
    assert curves.choose(NOT).chosen == 2  # as near as it gets
    assert curves.choose(PAYS, accuracy=0.6).chosen == 1
    assert curves.choose(PAYS, latency_ms=2.0).chosen == 1
    assert curves.choose(PAYS, latency_ms=2.1).chosen == 2
    with pytest.raises(
        BudgetError, match=r"no thresholds reach an accuracy of 80.00 %: the best reach 72.00 %, 8.00 points"
    ):
        curves.choose(PAYS, accuracy=0.8)
    with pytest.raises(
        BudgetError, match=r"no thresholds answer in 0.4 ms on average \(batch 1\): .* 1 ms, 0.6 ms more"
    ):
        curves.choose(PAYS, latency_ms=0.4)
    with pytest.raises(RequestError, match="not both"):
        curves.choose(PAYS, accuracy=0.5, latency_ms=1)


def test_a_point_is_judged_by_images_that_it_was_not_chosen_on() -> None:
    """Whatever the accuracies are that it is judged by, the choice is the same."""
    for wanted in ({}, {"accuracy": 0.6}, {"latency_ms": 2.0}):
        for curve in (PAYS, NOT, EVEN):
            lucky = dataclasses.replace(
                curve,
                points=[dataclasses.replace(p, accuracy=1 - p.accuracy) for p in curve.points],
                fixed=[dataclasses.replace(p, accuracy=1 - p.accuracy) for p in curve.fixed],
            )
            assert curves.choose(lucky, **wanted).chosen == curves.choose(curve, **wanted).chosen


def test_wanted_is_a_share_or_a_time_above_0(bundle: Path) -> None:
    model = ddnn.load(bundle)
    for asked, sentence in (
        ({"accuracy": 70}, "an accuracy of 70 is none; it is a share from 0 to 1"),
        ({"accuracy": float("nan")}, "an accuracy of nan is none"),
        ({"accuracy": "0.7"}, "an accuracy of '0.7' is none"),
        ({"latency_ms": float("nan")}, "a budget of nan ms must be a number above 0"),
        ({"latency_ms": -1}, "a budget of -1 ms must be a number above 0"),
    ):
        with pytest.raises(RequestError, match=sentence):
            curves.choose(PAYS, **asked)
        with pytest.raises(RequestError, match=sentence):  # before a curve is looked for
            model.thresholds(**asked)


def test_latencies_of_seconds_have_no_exponent() -> None:
    slow = a_curve({1: [1000.0, 2000.0, 3210.0]}, [0.5, 0.62, 0.71], {1: [1000.0, 1500.0, 2100.0]})
    texts = [text for _, text in sentences.verdicts(slow)] + [sentences.worst(slow)]
    texts += [
        cell.text for table in (tables.curve_table(slow), tables.match_table(slow)) for r in table.rows for cell in r
    ]
    assert "3210" in " ".join(texts)
    assert not any("e+" in text for text in texts)
    with pytest.raises(BudgetError, match="the quickest take 1000 ms, 999 ms more"):
        curves.choose(slow, latency_ms=1)


def test_the_page_says_it_all_and_needs_nothing_else(bundle: Path, tmp_path: Path) -> None:
    from ddnn.runtime.output import write_cascade

    manifest = ddnn.load(bundle).manifest
    for found in (PAYS, NOT, EVEN):
        page, *figures = write_cascade(found, manifest, tmp_path)
        text = page.read_text()
        assert [path.name for path in figures] == ["cascade.svg", "cascade.png"]
        for sentence in [sentences.headline(found), *(text for _, text in sentences.verdicts(found))]:
            assert sentence in text
        assert "<svg" in text
        assert "<script" not in text
        assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "")
        for point in [*found.fixed, *found.points]:
            assert f"{100 * point.accuracy:.2f}" in text


def test_the_table_has_every_depth_and_every_cascade() -> None:
    table = tables.curve_table(PAYS)
    assert [row[0].text for row in table.rows] == [*NETS, "cascade", "cascade", "chosen"]
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert tables.threshold(NEVER) == "left out"
    assert tables.threshold(0.0) == "all"
