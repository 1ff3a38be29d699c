"""The verbs of a device as a person meets them: exit codes, sentences, JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bundles
from ddnn.cli.device import watched
from ddnn.cpus import available_cpus
from ddnn.errors import RunError
from ddnn.runtime import curve, load, profile, tuning
from ddnn.runtime.manifest import read as read_manifest

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a profile of one thread and of all there are, whose numbers are known."""
    folder = bundles.make(tmp_path_factory.mktemp("bundles") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "_memory_of_process", lambda *_: (60.0, 70.0))
        found = profile.measure(folder, [1], sorted({1, available_cpus()}), seconds=0)
        profile.write(found, read_manifest(folder))
    path = next(folder.glob("machines/*/profile.json"))
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["p50_ms"] = {"small": 1.0, "middle": 2.0, "large": 4.0}[row["depth"]]
        row["p95_ms"] = 2 * row["p50_ms"]
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (21, 13, 3), dtype=np.uint8)).save(path)
    return path


def test_predict_prints_what_the_model_says(ddnn: Call, bundle: Path, photo: Path) -> None:
    code, out, err = ddnn("predict", bundle, photo, "--depth", "small", "--top", 2)
    expected = load(bundle).predict(photo, "small", top=2)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{photo} (small)",
        *(f"  {100 * sure:6.2f} %  {name}" for name, sure in expected.classes),
    ]
    code, out, _ = ddnn("predict", bundle, photo, photo, "--json")
    found = json.loads(out)["predictions"]
    assert [each["depth"] for each in found] == ["large", "large"]
    assert [each["class"] for each in found[0]["classes"]] == [name for name, _ in load(bundle).predict(photo).classes]


def test_predict_finds_its_depth(ddnn: Call, bundle: Path, photo: Path) -> None:
    def depth(*options: object) -> str:
        return str(json.loads(ddnn("predict", bundle, photo, "--json", *options)[1])["predictions"][0]["depth"])

    assert depth("--latency-ms", 2.5) == "middle"
    assert depth("--latency-ms", 100) == "large"
    assert depth("--cascade", "--threshold", 0) == "small"
    assert depth("--cascade", "--threshold", 2, "--threshold", 0) == "middle"
    code, out, _ = ddnn("predict", bundle, photo, "--latency-ms", 0.5, "--json")
    assert (code, json.loads(out)["predictions"]) == (1, [])
    assert json.loads(out)["reason"].startswith("no depth")
    code, _, err = ddnn("predict", bundle, photo, "--latency-ms", 0.5)
    assert code == 1
    assert "error: no depth fits: small, which comes nearest, takes 1 ms, 0.5 ms more than 0.5 (p50;" in err
    code, _, err = ddnn("predict", bundle, photo, "--cascade")
    assert code == 2
    assert "error: there are no thresholds measured on this machine; run: ddnn cascade" in err


def test_an_unreadable_image_does_not_keep_the_others(ddnn: Call, bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("none")
    code, out, err = ddnn("predict", bundle, tmp_path / "x.png", photo)
    assert code == 1
    assert f"{photo} (large)" in out
    assert err.startswith(f"error: {tmp_path / 'x.png'} cannot be read as an image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        Image.new("RGB", (1, 9000)).save(tmp_path / "long.png")
        _, _, err = ddnn("predict", bundle, tmp_path / "long.png")
    assert err == (
        f"error: {tmp_path}/long.png: an image of 1 x 9000 pixels is too long and narrow to be resized; crop it\n"
    )
    code, out, _ = ddnn("predict", bundle, tmp_path / "x.png", photo, "--json")
    assert code == 1
    assert [sorted(each) for each in json.loads(out)["predictions"]] == [
        ["error", "image"],
        ["classes", "depth", "image"],
    ]


def test_pick_names_the_most_accurate_that_fits(ddnn: Call, bundle: Path) -> None:
    code, out, err = ddnn("pick", bundle, "--latency-ms", 2, "--threads", 1)
    assert (code, err) == (0, "")
    assert out == "middle: top-1 70.00 %, 2 ms (p95 4 ms), at most 70 MiB; batch 1, 1 thread\n"
    code, out, _ = ddnn("pick", bundle, "--latency-ms", 2, "--p95", "--json")
    found = json.loads(out)
    assert (found["depth"], found["top1"], found["p95_ms"]) == ("small", 0.6, 2.0)
    code, out, err = ddnn("pick", bundle, "--latency-ms", 2, "--memory-mb", 35, "--json")
    assert code == 1
    assert json.loads(out)["depth"] is None
    assert "takes 70 MiB, 35 MiB more than 35" in err


def test_profile_measures_and_keeps(ddnn: Call, tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "bundle")
    code, out, err = ddnn("profile", folder, "--batch", 2, "--threads", 1, "--seconds", 0)
    assert code == 0
    assert "error" not in err
    for text in (
        *bundles.PATHS,
        "median ms",
        "p95 ms",
        "memory MiB",
        "all depths in one process, batch 2",
        "profile.svg",
    ):
        assert text in out
    files = [line for line in out.splitlines() if line.startswith(str(folder))]
    assert [Path(file).name for file in files] == ["profile.json", "profile.svg", "profile.png"]
    assert all(Path(file).stat().st_size for file in files)
    assert ddnn("pick", folder, "--latency-ms", 1e6, "--batch", 2, "--threads", 1)[1].startswith("large: top-1 80.00 %")


def test_without_matplotlib_there_is_no_figure(ddnn: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(profile, "_memory_of_process", lambda *_: (60.0, 70.0))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = bundles.make(tmp_path / "bundle")
    code, out, err = ddnn("profile", folder, "--batch", 1, "--threads", 1, "--seconds", 0)
    assert code == 0
    assert "profile.json" in out
    assert "profile.svg" not in out
    assert (
        "no page or figure: this needs the extra figures (matplotlib is not installed): pip install 'ddnn[figures]'"
        in err
    )


@pytest.fixture
def held(tmp_path: Path, bundle: Path) -> Path:
    random = np.random.default_rng(8)
    pixels = random.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    labels = np.where(random.uniform(size=80) < 0.85, load(bundle)(pixels).argmax(1), random.integers(0, 4, 80))
    np.savez(tmp_path / "held.npz", images=pixels, labels=labels)
    return tmp_path / "held.npz"


def test_cascade_measures_chooses_and_is_used(ddnn: Call, bundle: Path, held: Path, photo: Path) -> None:
    options = ("--batch", 1, "--batch", 4, "--seconds", 0, "--threads", 1)
    code, out, err = ddnn("cascade", bundle, "--data", held, *options)
    assert code == 0
    assert "error" not in err
    for text in (
        "The cascade",
        "Batch 1:",
        "Batch 4:",
        "goes all the way",
        "Where it pays was looked up",
        "Chosen for the accuracy of the most accurate",
    ):
        assert text in out
    page = next(bundle.glob("machines/*/cascade.html")).read_text()
    assert "<h1" in page
    code, out, _ = ddnn("cascade", bundle, "--data", held, *options, "--accuracy", 0.3, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["wanted"] == "an accuracy of 30.00 %"
    thresholds = found["points"][found["chosen"]]["thresholds"]
    answer = load(bundle).predict(photo, threshold=thresholds)
    code, _, err = ddnn("predict", bundle, photo, "--cascade", "--threads", 3)
    assert code == 2
    assert "error: the cascade was not measured with 3 threads but with 1 thread; run: ddnn cascade" in err
    code, out, _ = ddnn("predict", bundle, photo, "--cascade", "--top", 1, "--threads", 1)
    assert out.splitlines()[0] == f"{photo} ({answer.depth})"


def test_a_cascade_that_cannot_be_says_by_how_much_and_keeps_the_curve(ddnn: Call, bundle: Path, held: Path) -> None:
    options = ("--batch", 1, "--seconds", 0, "--threads", 1)
    code, out, err = ddnn("cascade", bundle, "--data", held, *options, "--accuracy", 1)
    assert code == 1
    assert "error: no thresholds reach an accuracy of 100.00 %: the best reach" in err
    assert "cascade.html" in out
    code, _, err = ddnn("cascade", bundle, "--data", held, *options, "--latency-ms", 1e-9)
    assert code == 1
    assert "error: no thresholds answer in 1e-09 ms on average (batch 1): the quickest take" in err


def test_a_bundle_that_cannot_be_written_is_named_before_measuring(
    ddnn: Call, tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundles.make(tmp_path / "bundle")
    (folder / "machines").write_text("in the way")
    monkeypatch.setattr(profile, "in_turns", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setattr(tuning, "in_turns", lambda *_, **__: pytest.fail("it measures"))
    for verb in (["profile"], ["cascade", "--data", held]):
        code, _, err = ddnn(*verb, folder)
        assert code == 1
        assert f"error: cannot write in {folder}/machines/" in err


def test_a_name_is_no_markup(ddnn: Call, tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundles.make(tmp_path / "bundle")
    content = json.loads((folder / "manifest.json").read_text())
    content["nets"][0]["name"] = "[/x]"
    (folder / "manifest.json").write_text(json.dumps(content))
    monkeypatch.setattr(profile, "_memory_of_process", lambda *_: (60.0, 70.0))
    for verb in (["profile"], ["cascade", "--data", held]):
        code, out, _ = ddnn(*verb, folder, "--threads", 1, "--batch", 1, "--seconds", 0)
        assert code == 0
        assert "[/x]" in out
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda _: True))
    with watched(quiet=False) as watch:
        watch("memory of [/x]")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_measured_is_printed_even_if_it_cannot_be_kept(
    ddnn: Call, tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise RunError(f"cannot write {path}: No space left on device")

    for module in (profile, curve):
        monkeypatch.setattr(module, "write_atomic", full)
    monkeypatch.setattr(profile, "_memory_of_process", lambda *_: (60.0, 70.0))
    folder = bundles.make(tmp_path / "bundle")
    options = [folder, "--threads", 1, "--batch", 1, "--seconds", 0, *(["--json"] if as_json else [])]
    for verb, rows in ((["profile"], "rows"), (["cascade", "--data", held], "points")):
        code, out, err = ddnn(*verb, *options)
        assert code == 1
        assert "error: cannot write" in err
        assert json.loads(out)[rows] if as_json else "small" in out


def test_batch_sizes_nobody_asked_for_are_left_out(ddnn: Call, tmp_path: Path, held: Path) -> None:
    folder = bundles.make(tmp_path / "bundle")
    options = [folder, "--data", held, "--limit", 20, "--threads", 1, "--seconds", 0]
    code, out, _ = ddnn("cascade", *options, "--json")
    assert code == 0
    assert list(json.loads(out)["calls"]) == ["1", "8"]
    code, _, err = ddnn("cascade", *options, "--batch", 32)
    assert code == 2
    assert "error: batch sizes must be from 1 to the 10 images" in err


def test_held_out_images_that_cannot_be_read_are_said(ddnn: Call, tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "bundle")
    random = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "held" / bundles.CLASSES[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "held" / "ant" / "broken.png").write_text("none")
    code, out, err = ddnn("cascade", folder, "--data", tmp_path / "held", "--threads", 1, "--seconds", 0, "--json")
    assert code == 0
    sentence = (
        f"1 of 25 images in {tmp_path}/held could not be read, the first: {tmp_path}/held/ant/broken.png cannot be"
    )
    assert err.count(f"warning: {sentence}") == 1
    (note,) = json.loads(out)["unread"]
    assert note.startswith(sentence)
    assert sentence in next(folder.glob("machines/*/cascade.html")).read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("predict", "/nowhere", "x"), 1, "error: /nowhere is no bundle: it has no manifest.json"),
        (
            ("predict", "BUNDLE", "x", "--depth", "huge"),
            2,
            "error: no depth 'huge' in this bundle; it has small, middle",
        ),
        (("predict", "BUNDLE", "x", "--depth", "small", "--cascade"), 2, "each say which net answers"),
        (("predict", "BUNDLE", "x", "--threshold", 0.5), 2, "--threshold is for --cascade"),
        (("predict", "BUNDLE", "x", "--cascade", "--threshold", -1), 2, "-1.0 is no threshold"),
        (("pick", "BUNDLE"), 2, "error: nothing to pick by"),
        (("pick", "/nowhere", "--latency-ms", 1), 1, "error: /nowhere is no bundle"),
        (("pick", "BUNDLE", "--latency-ms", 1, "--batch", 5), 2, "/bundle --batch 5 --threads"),
        (("profile", "/nowhere"), 1, "error: /nowhere is no bundle"),
        (("cascade", "BUNDLE"), 2, "give held-out images by --data or by --run"),
        (("cascade", "BUNDLE", "--data", "/nowhere"), 2, "error: /nowhere is no held-out data"),
        (("cascade", "BUNDLE", "--data", "x", "--accuracy", 0.5, "--latency-ms", 1), 2, "not both"),
        (
            ("cascade", "BUNDLE", "--data", "x", "--latency-ms", "nan"),
            2,
            "error: a budget of nan ms must be a number above 0",
        ),
        (
            ("cascade", "BUNDLE", "--data", "x", "--latency-ms", -5),
            2,
            "error: a budget of -5.0 ms must be a number above 0",
        ),
        (("cascade", "BUNDLE", "--run", "/nowhere"), 1, "error: /nowhere is no run folder"),
    ],
)
def test_mistakes_end_in_a_sentence(
    ddnn: Call, bundle: Path, arguments: tuple[object, ...], code: int, sentence: str
) -> None:
    got, _, err = ddnn(*(bundle if each == "BUNDLE" else each for each in arguments))
    assert sentence in " ".join(err.replace("│", " ").split())
    assert got == code
    assert "Traceback" not in err
