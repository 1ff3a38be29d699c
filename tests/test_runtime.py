"""A bundle on a device: what it computes, from many threads, over shared weights, and what loading it takes."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import bundles
import ddnn
from ddnn.errors import BundleError, RequestError
from ddnn.runtime.graphs import externals
from ddnn.runtime.machine import this_machine
from ddnn.runtime.manifest import read as read_manifest
from ddnn.runtime.sessions import Sessions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.make(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(5).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_depth_computes_what_is_written_out(bundle: Path, shared: bool, count: int) -> None:
    model = ddnn.load(bundle, shared=shared)
    images = bundles.normalised(count)
    for name in bundles.PATHS:
        expected = bundles.reference(name, images)
        logits = model(images, depth=name)
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(model(images), model(images, "large"))


def test_depths_are_named_shallow_to_deep(bundle: Path) -> None:
    model = ddnn.load(bundle)
    assert model.depths == {"small": (1,), "middle": (2,), "large": (3,)}
    assert model.classes == bundles.CLASSES
    assert repr(list(model.nets)) == "['small', 'middle', 'large']"


def test_one_depth_is_loaded_alone(bundle: Path, tmp_path: Path) -> None:
    import shutil

    images = bundles.normalised(3)
    model = ddnn.load(bundle, only=["middle"])
    assert list(model.depths) == ["middle"]
    assert np.array_equal(model(images), ddnn.load(bundle)(images, "middle"))
    with pytest.raises(RequestError, match="no depth 'large' loaded in this bundle; it has middle"):
        model(images, "large")
    with pytest.raises(RequestError, match="a cascade needs all depths"):
        model.cascade(images, 0.5)
    shutil.copytree(bundle, tmp_path / "copy")
    for other in ("small", "large"):  # one depth needs only its own graph
        (tmp_path / "copy" / f"{other}.onnx").unlink()
    assert np.array_equal(ddnn.load(tmp_path / "copy", "middle")(images), model(images))


def test_no_images_give_no_logits(bundle: Path) -> None:
    model = ddnn.load(bundle)
    for nothing in (np.zeros((0, 3, 8, 8), np.float32), np.zeros((0, 9, 9, 3), np.uint8)):
        assert model(nothing, "small").shape == (0, 4)
        assert model.cascade(nothing, 0.5).logits.shape == (0, 4)


@pytest.mark.parametrize("shared", [False, True])
def test_many_threads_get_what_one_gets(bundle: Path, shared: bool) -> None:
    """Bitwise, with every depth and the cascade called at the same time, from the first call on."""
    jobs = [(seed, name) for seed in range(40) for name in [*bundles.PATHS, "cascade"]]
    sizes = {seed: 1 + seed % 5 for seed in range(40)}

    def run(model: ddnn.runtime.Model, seed: int, name: str) -> np.ndarray:
        images = bundles.normalised(sizes[seed], seed)
        return model.cascade(images, 0.9).logits if name == "cascade" else model(images, name)

    alone = ddnn.load(bundle, threads=1, shared=shared)
    expected = [run(alone, *job) for job in jobs]
    model = ddnn.load(bundle, threads=1, shared=shared)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: run(model, *job), jobs))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_predict_names_classes_and_confidences(bundle: Path, photo: Path) -> None:
    model = ddnn.load(bundle)
    prediction = model.predict(photo, "small", top=2)
    logits = bundles.reference("small", model.read(photo)[None])[0]
    sure = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-sure)[:2]
    assert prediction.depth == "small"
    assert [name for name, _ in prediction.classes] == [bundles.CLASSES[i] for i in best]
    assert [confidence for _, confidence in prediction.classes] == pytest.approx(list(sure[best]), rel=1e-5)
    assert model.predict(str(photo)).depth == "large"
    assert sum(confidence for _, confidence in model.predict(photo, top=99).classes) == pytest.approx(1)
    assert model.predict(photo, threshold=0.0).depth == "small"
    assert model.predict(photo, threshold=[2.0, 0.0]).depth == "middle"
    with pytest.raises(RequestError, match="a cascade chooses the depth itself"):
        model.predict(photo, "small", threshold=0.5)


@pytest.mark.parametrize("odd", [5, ["small"], {"small": 1}, b"small"])
def test_a_depth_that_is_no_name_gets_a_sentence(bundle: Path, photo: Path, odd: Any) -> None:
    model, images = ddnn.load(bundle), bundles.normalised(1)
    for ask in (lambda: model(images, odd), lambda: model.predict(photo, odd), lambda: model.warm(odd)):
        with pytest.raises(RequestError, match=r"no depth .* in this bundle; it has small, middle, large"):
            ask()
    if odd != ["small"]:
        with pytest.raises(RequestError, match=r"it has small|must be names of depths; .* has small") as caught:
            ddnn.load(bundle, only=odd if isinstance(odd, int) else [odd])
        assert repr(odd) in str(caught.value)


def test_other_odd_arguments_get_a_sentence(bundle: Path, photo: Path) -> None:
    model = ddnn.load(bundle)
    for top in (0, 1.5, "5", True):
        with pytest.raises(RequestError, match=r"top=.* must be a whole number of at least 1"):
            model.predict(photo, top=top)  # type: ignore[arg-type]
    for path in ("a\0b", 5.5, None):
        with pytest.raises(RequestError, match="is no path to a bundle"):
            ddnn.load(path)  # type: ignore[arg-type]


# ---- the shared copy


def copy_name(bundle: Path) -> str:
    return f"shared-{read_manifest(bundle).digest[:12]}"


def test_shared_weights_are_in_the_file_once(bundle: Path) -> None:
    ddnn.load(bundle, shared=True)
    folder = bundle / "machines" / this_machine().key / copy_name(bundle)
    index = json.loads((folder / "shared.json").read_text())
    at = {
        graph: {tuple(place[3]): place[0] for place in tensors.values() if len(place[3]) == 4 and place[3][1] > 3}
        for graph, tensors in index["graphs"].items()
    }
    assert len(index["graphs"]) == 6
    convolutions = {place for places in at.values() for place in places.values()}
    assert convolutions  # laid out, they are still the same in all graphs
    originals = (bundle / "weights.bin").stat().st_size
    assert (folder / "shared.bin").stat().st_size < 1.5 * originals + 16 * 4096


def test_the_shared_copy_is_made_once_and_again_when_damaged(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("machines"))
    images = bundles.normalised(4)
    expected = ddnn.load(copy, shared=True)(images)
    folder = copy / "machines" / this_machine().key / copy_name(copy)
    written = (folder / "shared.json").stat().st_mtime_ns
    assert np.array_equal(ddnn.load(copy, shared=True)(images), expected)
    assert (folder / "shared.json").stat().st_mtime_ns == written
    for name in ("shared.bin", "shared.json", "large.onnx"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert np.array_equal(ddnn.load(copy, shared=True)(images), expected)
    for nonsense in ("[]", "[" * 100_000):
        (folder / "shared.json").write_text(nonsense)
        assert np.array_equal(ddnn.load(copy, shared=True)(images), expected)
    (folder / "shared.bin").write_bytes((folder / "shared.bin").read_bytes()[:-100])
    assert np.array_equal(ddnn.load(copy, shared=True)(images), expected)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half-written is left


def test_many_may_make_the_shared_copy_at_once(bundle: Path, tmp_path: Path) -> None:
    """Threads and processes; what a killed one has left is swept."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("machines"))
    folder = copy / "machines" / this_machine().key
    left = folder / f".{copy_name(copy)}.{'0' * 16}.tmp"
    left.mkdir(parents=True)
    images = bundles.normalised(3)
    np.save(tmp_path / "images.npy", images)
    code = f"""
import ddnn, numpy
model = ddnn.load({str(copy)!r}, shared=True)
print(model(numpy.load({str(tmp_path / "images.npy")!r})).tobytes().hex())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ddnn.load(copy, shared=True)(images).tobytes().hex(), range(4)))
    found += [process.communicate()[0].strip() for process in processes]
    assert len(set(found)) == 1
    assert [path.name for path in folder.iterdir()] == [copy_name(copy)]


def test_a_bundle_that_cannot_be_written_to_is_loaded_without_sharing(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("machines"))
    (copy / "machines").write_text("in the way")
    with pytest.raises(BundleError, match=r"the shared copy can't be made: cannot write .*; load without shared"):
        ddnn.load(copy, shared=True)
    assert ddnn.load(copy)(bundles.normalised(1)).shape == (1, 4)


def test_the_shared_copy_belongs_to_its_bundle(tmp_path: Path) -> None:
    """One in use goes on with what it was made of; one that nobody uses is removed by the next that is made."""
    bundle, images = bundles.make(tmp_path / "b"), bundles.normalised(2)
    old = ddnn.load(bundle, shared=True)
    for seed, copies in ((7, 2), (8, 2)):
        other = bundles.make(tmp_path / f"other{seed}", seed=seed)
        for path in other.iterdir():
            path.replace(bundle / path.name)
        expected = bundles.reference("large", images, bundles.weights(seed))
        assert np.abs(ddnn.load(bundle, shared=True)(images) - expected).max() < 1e-4
        assert len(list(bundle.glob("machines/*/shared-*"))) == copies
    for name in bundles.PATHS:
        expected = bundles.reference(name, images)
        assert np.abs(old(images, name) - expected).max() < 1e-4


# ---- files that change after they were checked


def write_in_place(bundle: Path, other: Path) -> None:
    (bundle / "weights.bin").write_bytes((other / "weights.bin").read_bytes())


def put_another(bundle: Path, other: Path) -> None:
    (other / "weights.bin").replace(bundle / "weights.bin")


def remove(bundle: Path, other: Path) -> None:
    (bundle / "weights.bin").unlink()


@pytest.mark.parametrize("change", [write_in_place, put_another, remove])
def test_a_bundle_that_changes_after_loading_is_refused(tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    bundle, other = bundles.make(tmp_path / "b"), bundles.make(tmp_path / "other", seed=7)
    model, images = ddnn.load(bundle), bundles.normalised(2)
    before = model(images, "small")
    change(bundle, other)
    for name in ("middle", "large"):
        with pytest.raises(BundleError, match=r"weights.bin has changed since it was loaded; load .*b again"):
            model(images, name)
    with pytest.raises(BundleError, match="has changed since it was loaded"):
        model.cascade(images, [2.0, 0.5])
    if change is not write_in_place:  # onnxruntime has mapped the file into memory
        assert np.array_equal(model(images, "small"), before)


def test_a_change_while_a_graph_is_made_ready_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, other = bundles.make(tmp_path / "b"), bundles.make(tmp_path / "other", seed=7)
    model, made = ddnn.load(bundle), Sessions._make

    def late(self: Sessions, graph: str, only: Sequence[str]) -> Any:
        put_another(bundle, other)
        return made(self, graph, only)

    monkeypatch.setattr(Sessions, "_make", late)
    with pytest.raises(BundleError, match="has changed since it was loaded"):
        model(bundles.normalised(1))


def test_links_and_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles.make(tmp_path / "old")
    bundles.make(tmp_path / "new", seed=7)
    link, images = tmp_path / "bundle", bundles.normalised(2)
    link.symlink_to("old")
    monkeypatch.chdir(tmp_path)
    models = [ddnn.load("bundle"), ddnn.load("old"), ddnn.load("bundle", shared=True)]
    link.unlink()
    link.symlink_to("new")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "old").symlink_to("../new")
    for model in models:
        assert np.abs(model(images) - bundles.reference("large", images)).max() < 1e-4


def test_tensors_outside_of_a_graph_are_found(bundle: Path) -> None:
    """As the onnx package finds them."""
    for path in bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = []
        for tensor in model.graph.initializer:
            about = {entry.key: entry.value for entry in tensor.external_data}
            expected.append((tensor.name, tuple(tensor.dims), int(about["offset"]), int(about["length"])))
        found = externals(path.read_bytes())
        assert [(each.name, each.shape, each.offset, each.length) for each in found] == expected
        assert {(each.kind, each.file) for each in found} == {("float32", "weights.bin")}


# ---- what a device needs

HEAVY = ("torch", "torchvision", "datasets", "pydantic", "matplotlib", "onnx", "rich", "typer", "jinja2", "scipy")


def test_a_device_needs_no_training_side(bundle: Path, photo: Path) -> None:
    """Loading and running import neither a package nor a module of it, even where they are installed."""
    code = f"""
import sys
import ddnn, ddnn.runtime
model = ddnn.load({str(bundle)!r})
model.predict({str(photo)!r}, "small")
model.predict({str(photo)!r}, threshold=0.5)
print(sorted(name for name in sys.modules if name.partition(".")[0] in {HEAVY!r} or name.startswith("ddnn.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("ddnn.").partition(".")[0] for name in json.loads(done.stdout.replace("'", '"'))}
    assert loaded <= {"version", "errors", "cpus", "timing", "wording", "files", "picture", "runtime"}


def test_a_missing_package_ends_in_a_sentence(bundle: Path) -> None:
    code = """
import sys
for name in ("torch", "onnxruntime", "pydantic"):
    sys.modules[name] = None
import ddnn
for name in ("nest", "load"):
    try:
        getattr(ddnn, name)
    except ModuleNotFoundError as error:
        print(error)
from ddnn import cli
for verb in (["predict", "b", "x"], ["train"]):
    sys.argv = ["ddnn", *verb]
    try:
        cli.main()
    except SystemExit as stopped:
        print(stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "ddnn.nest: this needs the extra train (torch is not installed): pip install 'ddnn[train]'",
        "ddnn.load: this needs the extra runtime (onnxruntime is not installed): pip install 'ddnn[runtime]'",
        "1",
        "1",
    ]
    assert "error: this needs the extra train (pydantic is not installed): pip install 'ddnn[train]'" in done.stderr
    assert "Traceback" not in done.stderr
