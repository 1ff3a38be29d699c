import os
import random
import re
import shutil
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from ddnn import data
from ddnn.data.sets import Held, Stored
from ddnn.data.sources import arrays
from ddnn.errors import DataError
from ddnn.recipe import Data, Recipe, parse

CPU = torch.device("cpu")
has_real_data = bool(os.environ.get("DDNN_DATA")) and Path(os.environ["DDNN_DATA"], "cifar100").is_dir()
needs_cifar100 = pytest.mark.skipif(not has_real_data, reason="DDNN_DATA is unset or holds no cifar100")
# Of Python and of torch, about starting workers from a process with threads, and more of them than there are cores.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")


@pytest.fixture(autouse=True)
def _own_folders(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes outside its own folder, but for those that ask for the real data."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if not request.node.get_closest_marker("data"):
        monkeypatch.delenv("DDNN_DATA", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def recipe(augment: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    return parse({"augment": augment or {}, **sections})


def noise(n: int = 40, size: int = 12, classes: int = 4) -> data.DataSet:
    """Random pixels, each image unlike every other, and left as they are by normalisation but for the 255."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    held = Held(torch.arange(n) % classes, pixels)
    names = tuple("abcdefgh"[:classes])
    return data.DataSet("noise", names, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), held, None, held, (), "")


def batches(dataset: data.DataSet, recipe: Recipe, epoch: int = 0, start: int = 0) -> list[tuple[Any, Any]]:
    return list(data.train_batches(dataset, recipe, epoch=epoch, start=start, device=CPU))


def same(left: list[tuple[Any, Any]], right: list[tuple[Any, Any]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(left, right, strict=True)
    )


def write(path: Path, colour: Any = (10, 20, 30), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(root / name / f"{i}{suffix}", (40 * number, i, 7))
    return root


def photographs(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 36)) -> Path:
    """Class folders of noise: no two pixels, and so no two crops or resizings, are alike."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def source(path: Path | str, **keys: Any) -> Data:
    return Data(source=str(path), **keys)


def original(images: data.Images) -> list[int]:
    """Which images of the whole data set a split that is not held in memory has."""
    assert isinstance(images, Stored)
    return images.files.index.tolist()


# ---- random streams


def test_stream_key_is_a_fixed_function_of_typed_parts() -> None:
    assert data.stream_key(0, "order", 3) == data.stream_key(0, "order", 3)
    assert data.stream_key(0, "order", 3) == 6254814875441857239  # resuming needs the same key in every version
    parts: list[tuple[int | str, ...]] = [
        (0,),
        ("0",),
        (0, 0),
        (),
        ("ab", "c"),
        ("a", "bc"),
        (1, 23),
        (12, 3),
        (2**70,),
    ]
    keys = {data.stream_key(*p) for p in parts}
    assert len(keys) == len(parts)
    assert all(0 <= key < 2**63 for key in keys)


WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "erasing": {"erasing": 0.5},
    "mixes": {"mixup": 0.4, "cutmix": 1.0},
    "trivialaugment": {"policy": "trivialaugment"},
    "randaugment": {"policy": "randaugment", "crop": "none", "flip": False},
    "autoaugment": {"policy": "autoaugment", "padding": 0},
    "resized": {"crop": "resized", "erasing": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_started_late_is_the_tail_of_the_whole(way: str) -> None:
    setup = recipe(WAYS[way], train={"batch_size": 8}, data={"workers": 0})
    dataset = noise(44)
    whole = batches(dataset, setup)
    assert len(whole) == 5
    assert all(x.shape == (8, 3, 12, 12) and x.dtype == torch.float32 for x, _ in whole)
    for start in (0, 2, 4, 5):
        assert same(batches(dataset, setup, start=start), whole[start:])
    assert not same(batches(dataset, setup, epoch=1), whole)
    other = recipe(WAYS[way], train={"batch_size": 8, "seed": 1}, data={"workers": 0})
    assert not same(batches(dataset, other), whole)


@pytest.mark.parametrize("way", WAYS)
def test_global_random_state_is_neither_read_nor_changed(way: str) -> None:
    setup = recipe(WAYS[way], train={"batch_size": 8}, data={"workers": 0})
    torch.manual_seed(1)
    first = batches(noise(), setup)
    torch.manual_seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert same(batches(noise(), setup), first)
    list(data.eval_batches(noise(), noise().test, 7, CPU))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@forks
@pytest.mark.parametrize("memory_mb", [0, 100])
def test_batches_do_not_depend_on_the_number_of_workers(memory_mb: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    results = []
    for workers in (0, 2):
        section = {"memory_mb": memory_mb, "workers": workers, "limit": 40, "image_size": 10}
        setup = recipe({"policy": "trivialaugment", "erasing": 0.3}, train={"batch_size": 8}, data=section)
        dataset = data.load(setup.data, 0)
        assert isinstance(dataset.train, Held if memory_mb else Stored)
        seen = batches(dataset, setup)
        assert same(batches(dataset, setup, start=3), seen[3:])
        results.append(seen + list(data.eval_batches(dataset, dataset.test, 16, CPU)))
    assert same(*results)
    assert torch.equal(torch.get_rng_state(), before)


# ---- augmentation


def windows(image: torch.Tensor, pad: int) -> Iterator[tuple[tuple[int, int, bool], torch.Tensor]]:
    side = image.shape[-1]
    padded = F.pad(image, [pad] * 4)
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, top : top + side, left : left + side]
            yield (top, left, False), window
            yield (top, left, True), window.flip(-1)


@pytest.mark.parametrize(
    "extra", [{}, {"padding": 3}, {"flip": False}, {"crop": "none"}, {"crop": "none", "flip": False}]
)
@pytest.mark.parametrize("stored", [False, True])
def test_every_image_is_a_window_of_its_own(extra: dict[str, Any], stored: bool) -> None:
    dataset = noise(64)
    if stored:  # the same law where the images go one by one; no policy keeps the pixels as they are
        held = dataset.train
        reader = types.SimpleNamespace(open=held.picture, name=str)
        reader.fetched = lambda indices: reader
        files = data.sources.Labelled(reader, torch.arange(64), held.labels)
        changed = Stored(held.labels, files, data.decode.Skipped("noise", 0), 0, 12)
        dataset = data.DataSet(**{**vars(dataset), "train": changed})
    setup = recipe(extra, train={"batch_size": 32}, data={"workers": 0})
    pad = 0 if extra.get("crop") == "none" else extra.get("padding", 12 // 8)
    images = noise(64).train.pixels.float()  # type: ignore[attr-defined]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(data.stream_key(0, "order", 0)))
    places = []
    x = torch.cat([x for x, _ in batches(dataset, setup)]) * 255
    target = torch.cat([target for _, target in batches(dataset, setup)])
    assert torch.equal(target, noise(64).train.labels[order])
    for seen, number in zip(x, order, strict=True):
        found = [place for place, w in windows(images[number], pad) if torch.allclose(seen, w, atol=1e-3)]
        assert len(found) == 1
        places += found
    tops, lefts, flips = (set(values) for values in zip(*places, strict=True))
    assert tops == lefts == set(range(2 * pad + 1))
    assert flips == ({True, False} if extra.get("flip", True) else {False})


def test_padding_is_black_and_defaults_to_an_eighth() -> None:
    dataset = noise(32, size=16)
    x = batches(dataset, recipe(train={"batch_size": 32}))[0][0]
    black = (x == 0).all(1)  # noise has no pixel of zero, so this is padding
    assert black.any()
    assert black[:, 2:-2, 2:-2].sum() == 0
    assert black[:, 1].any()


def test_erasing_blanks_a_rectangle_of_each_image_alone() -> None:
    plain = {"crop": "none", "flip": False}
    before = batches(noise(), recipe(plain, train={"batch_size": 40}))[0][0]
    after = batches(noise(), recipe({**plain, "erasing": 0.9}, train={"batch_size": 40}))[0][0]
    changed = (before != after).any(1)
    boxes = set()
    for image, mask in zip(after, changed, strict=True):
        if mask.any():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
            assert mask[box[0] : box[1], box[2] : box[3]].all()
            assert (image[:, box[0] : box[1], box[2] : box[3]] == 0).all()
            boxes.add(tuple(map(int, box)))
    assert 28 <= changed.flatten(1).any(1).sum() < 40
    assert len(boxes) > 20


def test_mixup_mixes_images_and_labels_by_the_same_share() -> None:
    for (x, label), (mixed, target) in zip(
        batches(noise(), recipe(train={"batch_size": 8})),
        batches(noise(), recipe({"mixup": 0.8}, train={"batch_size": 8})),
        strict=True,
    ):
        assert target.shape == (8, 4)
        assert target.dtype == torch.float32
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        own, other = F.one_hot(label, 4).float(), F.one_hot(label.roll(1), 4).float()
        row = (own != other).any(1).nonzero()[0, 0]
        share = target[row, label[row]]
        assert 0 < share < 1
        torch.testing.assert_close(target, share * own + (1 - share) * other)
        torch.testing.assert_close(mixed, share * x + (1 - share) * x.roll(1, 0))


def test_cutmix_pastes_a_rectangle_and_counts_its_area() -> None:
    shares = set()
    for (x, label), (mixed, target) in zip(
        batches(noise(), recipe(train={"batch_size": 8})),
        batches(noise(), recipe({"cutmix": 1.0}, train={"batch_size": 8})),
        strict=True,
    ):
        pasted = (mixed == x.roll(1, 0)).all(1) & ~(x == x.roll(1, 0)).all(1)
        assert torch.equal(mixed, torch.where(pasted[:, None], x.roll(1, 0), x))
        share = 1 - (mixed != x).any(1).flatten(1).float().mean(1).max()  # padding may be alike in both
        own, other = F.one_hot(label, 4).float(), F.one_hot(label.roll(1), 4).float()
        torch.testing.assert_close(target, share * own + (1 - share) * other, atol=0.02, rtol=0)
        shares.add(round(float(share), 3))
    assert len(shares) > 2


def test_mixup_and_cutmix_together_take_turns() -> None:
    plain = {"crop": "none", "flip": False}
    setup = recipe({**plain, "mixup": 1.0, "cutmix": 1.0}, train={"batch_size": 4})
    kinds = set()
    for (x, _), (mixed, target) in zip(
        batches(noise(80), recipe(plain, train={"batch_size": 4})), batches(noise(80), setup), strict=True
    ):
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        kinds.add(bool(((mixed == x) | (mixed == x.roll(1, 0))).all()))
    assert kinds == {True, False}


# ---- batches


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_evaluation_has_every_image_once_in_order(memory_mb: int) -> None:
    dataset = data.load(Data(limit=50, memory_mb=memory_mb, workers=0), 0)
    assert isinstance(dataset.test, Held if memory_mb else Stored)
    pixels = torch.stack([as_pixels(dataset.test.picture(i)) for i in range(50)])
    assert len(pixels.unique(dim=0)) == 50
    seen = list(data.eval_batches(dataset, dataset.test, 16, CPU))
    assert [len(x) for x, _ in seen] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([label for _, label in seen]), dataset.test.labels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), (pixels / 255 - mean) / std)


def as_pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("zoom", [1.0, 1.14])
@pytest.mark.parametrize("size", [(40, 36), (32, 32)])
def test_evaluation_does_not_depend_on_memory(tmp_path: Path, zoom: float, size: tuple[int, int]) -> None:
    root = photographs(tmp_path / "d", {"a": 12, "b": 12}, size)
    section = source(root, validation=0.3, image_size=32, zoom=zoom, workers=0)
    held, stored = (data.load(section.model_copy(update={"memory_mb": m}), 0) for m in (100, 0))
    assert isinstance(held.train, Held)
    assert isinstance(stored.train, Stored)
    assert (held.mean, held.std) == (stored.mean, stored.std)
    for part in ("train", "validation", "test"):
        left, right = (list(data.eval_batches(d, getattr(d, part), 5, CPU)) for d in (held, stored))
        assert same(left, right)
    side = round(32 * zoom)
    assert isinstance(held.test, Held)
    for pixels, number in zip(held.test.pixels, range(len(stored.test)), strict=True):
        picture = torchvision.transforms.v2.functional.resize(stored.test.picture(number), side)
        assert torch.equal(pixels, as_pixels(torchvision.transforms.v2.functional.center_crop(picture, 32)))
    for pixels, number in zip(held.train.pixels, range(len(stored.train)), strict=True):
        picture = torchvision.transforms.v2.functional.resize(stored.train.picture(number), 32)
        assert torch.equal(pixels, as_pixels(torchvision.transforms.v2.functional.center_crop(picture, 32)))


def test_statistics_of_many_images_do_not_depend_on_memory(tmp_path: Path) -> None:
    root = photographs(tmp_path / "d", {"a": 2, "b": 2}, (8, 8))
    for i in range(2, 1100):
        shutil.copy(root / f"a/{i % 2}.png", root / f"a/{i}.png")
    section = source(root, validation=0, test=0.01, image_size=300)  # more than 1024, the sample of that size
    held, stored = (data.load(section.model_copy(update={"memory_mb": m}), 0) for m in (2048, 0))
    assert isinstance(held.train, Held)
    assert isinstance(stored.train, Stored)
    assert (held.mean, held.std) == (stored.mean, stored.std)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [(40, 36), (32, 32)])
def test_resized_crops_are_of_the_whole_image(tmp_path: Path, whole: bool, size: tuple[int, int]) -> None:
    root = photographs(tmp_path / "d", {"a": 10, "b": 10}, size)
    section = source(root, validation=0.2, image_size=32, workers=0)
    setup = recipe({"crop": "resized"}, train={"batch_size": 4}, data=section.model_dump())
    held, stored = (data.load(section.model_copy(update={"memory_mb": m}), 0, whole=whole) for m in (100, 0))
    in_memory = not whole or size == (32, 32)
    assert isinstance(held.train, Held if in_memory else Stored)
    assert isinstance(held.test, Held)
    assert isinstance(held.validation, Held)
    assert isinstance(stored.train, Stored)
    assert same(batches(held, setup), batches(stored, setup)) == (whole or size == (32, 32))
    for part in ("train", "validation", "test"):
        assert same(*(list(data.eval_batches(d, getattr(d, part), 5, CPU)) for d in (held, stored)))


def test_whole_images_of_any_size_are_looked_at(tmp_path: Path) -> None:
    root = photographs(tmp_path / "d", {"a": 10, "b": 10}, (20, 20))
    assert isinstance(data.load(source(root, validation=0), 0, whole=True).train, Held)
    assert isinstance(data.load(source(root, validation=0, image_size=16), 0, whole=True).train, Stored)
    one_memory = source(root, validation=0, image_size=600, memory_mb=5)  # the test alone fits: 4 images
    assert isinstance(data.load(one_memory, 0, whole=True).test, Held)
    assert isinstance(data.load(one_memory, 0).test, Stored)


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_evaluation_without_a_readable_image_is_an_error(tmp_path: Path, memory_mb: int) -> None:
    root = class_folders(tmp_path / "d", {"a": 4, "b": 4})
    section = source(root, validation=0, test=0.5, memory_mb=memory_mb, workers=0, image_size=8)
    dataset = data.load(section, 0)
    images = dataset.test
    for path in root.rglob("*.png"):
        broken(path)
    if memory_mb:
        assert isinstance(images, Held)
        images = Held(images.labels[:0], images.pixels[:0])
    with pytest.raises(DataError, match=rf"not one of the {len(images)} images to evaluate can be read; repair them"):
        list(data.eval_batches(dataset, images, 3, CPU))


def test_training_images_are_normalised() -> None:
    dataset = data.load(Data(), 0)
    x = torch.cat([x for x, _ in data.eval_batches(dataset, dataset.train, 500, CPU)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_constant_channel_is_only_centred(tmp_path: Path) -> None:
    dataset = data.load(source(class_folders(tmp_path / "d", {"a": 8, "b": 8}), validation=0), 0)
    assert dataset.std[2] == 1
    x, _ = next(data.eval_batches(dataset, dataset.train, 4, CPU))
    assert torch.isfinite(x).all()
    assert x[:, 2].abs().max() < 1e-6


@pytest.mark.parametrize("way", ["batched", "mixes", "resized"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(way: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    setup = recipe(WAYS[way], train={"batch_size": 8, "channels_last": channels_last}, data={"workers": 0})
    assert all(x.is_contiguous(memory_format=layout) for x, _ in batches(noise(), setup))
    evaluated = data.eval_batches(noise(), noise().test, 8, CPU, channels_last=channels_last)
    assert all(x.is_contiguous(memory_format=layout) for x, _ in evaluated)


def test_last_partial_batch_is_dropped_and_too_few_images_are_an_error() -> None:
    assert data.steps_per_epoch(noise(40).train, 16) == 2
    assert data.steps_per_epoch(noise(40).train, 40) == 1
    with pytest.raises(DataError, match=r"train.batch_size=41 is more than the 40 training images; lower it"):
        data.steps_per_epoch(noise(40).train, 41)
    with pytest.raises(DataError, match=r"train.batch_size=64"):
        batches(noise(40), recipe(train={"batch_size": 64}))


# ---- splits


def test_parts_are_disjoint_stratified_and_cover_everything() -> None:
    section = Data(memory_mb=0, test=0.2, validation=0.1)
    dataset = data.load(section, 0)
    assert dataset.validation is not None
    parts = [original(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sorted(i for part in parts for i in part) == list(range(1797))
    everything = torch.cat([dataset.train.labels, dataset.validation.labels, dataset.test.labels]).bincount()
    assert torch.equal(dataset.test.labels.bincount(), (everything * 0.2).round().long())
    left = everything - dataset.test.labels.bincount()
    assert torch.equal(dataset.validation.labels.bincount(), (left * 0.1).round().long())
    assert original(data.load(section, 0).test) == parts[2]
    assert original(data.load(section, 1).test) != parts[2]


def test_no_validation_leaves_all_to_training() -> None:
    dataset = data.load(Data(validation=0, memory_mb=0), 0)
    assert dataset.validation is None
    assert len(dataset.train) + len(dataset.test) == 1797


def test_small_classes_are_in_every_part_they_can_be_in(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"one": 1, "two": 2, "three": 3, "thirty": 30})
    dataset = data.load(source(root, test=0.1, validation=0.1), 0)
    assert dataset.classes == ("one", "thirty", "three", "two")
    assert dataset.validation is not None
    assert dataset.train.labels.bincount(minlength=4).tolist() == [1, 24, 1, 1]
    assert dataset.validation.labels.bincount(minlength=4).tolist() == [0, 3, 1, 0]
    assert dataset.test.labels.bincount(minlength=4).tolist() == [0, 3, 1, 1]


@pytest.mark.parametrize("limit", [5, 10, 64, 10_000])
def test_limit_takes_every_class_evenly_after_the_split(limit: int) -> None:
    full = data.load(Data(memory_mb=0), 0)
    some = data.load(Data(memory_mb=0, limit=limit), 0)
    for name in ("train", "validation", "test"):
        part, whole = getattr(some, name), getattr(full, name)
        assert len(part) == min(limit, len(whole))
        assert set(original(part)) <= set(original(whole))
        assert original(part) == sorted(original(part))
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= (1 if limit < 100 else 40)
    assert original(data.load(Data(memory_mb=0, limit=limit), 0).train) == original(some.train)


# ---- fingerprint


def test_fingerprint_is_of_the_images_and_their_parts(tmp_path: Path) -> None:
    def of(root: Path, seed: int = 0, whole: bool = False, **keys: Any) -> str:
        return data.load(source(root, **{"image_size": 8, "workers": 0} | keys), seed, whole=whole).fingerprint

    root = class_folders(tmp_path / "d", {"a": 12, "b": 12})
    plain = of(root)
    assert re.fullmatch("2-[0-9a-f]{64}", plain)
    assert of(root, memory_mb=0, workers=3, image_size=16, zoom=1.5, whole=True) == plain
    elsewhere = shutil.copytree(root, tmp_path / "other/place")
    assert of(elsewhere) == plain
    broken(elsewhere / "a/1.png")
    assert of(elsewhere) == plain
    changed = [
        of(root, seed=1),
        of(root, limit=5),
        of(root, limit=6),
        of(root, validation=0),
        of(root, validation=0.4),
        of(root, test=0.4),
    ]
    shutil.copy(root / "a/1.png", root / "a/99.png")
    changed.append(of(root))
    changed.append(of(root, limit=5))
    (root / "a/99.png").rename(root / "b/99.png")
    changed.append(of(root))
    (root / "b").rename(root / "c")
    changed.append(of(root))
    assert len({plain, *changed}) == 1 + len(changed)


def test_fingerprint_tells_images_apart_by_name(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"a": 12, "b": 12})
    before = data.load(source(root), 0)
    (root / "a/3.png").rename(root / "a/new.png")  # other places in the order, so other images in the test set
    after = data.load(source(root), 0)
    assert after.former == before.former
    assert after.fingerprint != before.fingerprint
    assert not after.is_of(before.fingerprint)
    assert after.is_of(before.former)  # what a run of an earlier version recorded
    assert not after.is_of("")


def test_fingerprint_as_earlier_versions_made_it() -> None:
    recorded = "e5c365c8b540bde6679584b6a9bd7a25700f5df4b94be928ff233ee328121d3c"
    assert data.load(Data(), 0).is_of(recorded)


# ---- the test of another data set


SEEN: dict[str, Any] = {"classes": ("ant", "bee", "cat"), "image_size": 8, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_load_test_has_all_images_of_a_set_without_test_split(tmp_path: Path, memory_mb: int) -> None:
    root = photographs(tmp_path / "d", {"bee": 3, "cat": 2})
    keys: dict[str, Any] = {"memory_mb": memory_mb, "limit": 1, "test": 0, "workers": 0, "zoom": 1.2}
    dataset = data.load_test(source(root, **keys), **SEEN)
    assert dataset.name == str(root)
    assert {name: getattr(dataset, name) for name in SEEN} == SEEN
    assert isinstance(dataset.test, Held if memory_mb else Stored)
    assert dataset.train is dataset.test
    assert dataset.validation is None
    assert dataset.test.labels.tolist() == [1, 1, 1, 2, 2]
    other = data.load_test(source(root, **keys | {"memory_mb": 100 - memory_mb}), **SEEN)
    left, right = (list(data.eval_batches(d, d.test, 2, CPU)) for d in (dataset, other))
    assert same(left, right)
    assert dataset.fingerprint == other.fingerprint
    fewer = data.load_test(source(class_folders(tmp_path / "one", {"cat": 2})), **SEEN)
    assert fewer.test.labels.tolist() == [2, 2]
    assert fewer.fingerprint != dataset.fingerprint


@pytest.mark.parametrize("val", [False, True])
def test_load_test_has_the_test_split_alone(tmp_path: Path, val: bool) -> None:
    class_folders(tmp_path / "d/train", {"ant": 4, "cat": 4})
    class_folders(tmp_path / "d/test", {"cat": 3})
    if val:
        class_folders(tmp_path / "d/val", {"ant": 3})
    assert data.load_test(source(tmp_path / "d", limit=1), **SEEN).test.labels.tolist() == [2, 2, 2]


def test_load_test_maps_labels_by_name(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["cat", "ant", "bee"])
    parquet(tmp_path / "d/test.parquet", {"p": pictures(4), "label": [0, 1, 2, 0]}, p=PICTURE, label=kind)
    dataset = data.load_test(source(tmp_path / "d"), **SEEN)
    assert dataset.test.labels.tolist() == [2, 0, 1, 2]
    assert isinstance(dataset.test, Held)
    assert dataset.test.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_load_test_of_other_classes_is_an_error(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "the data", {"bee": 2, "dog": 2, "emu": 2})
    with pytest.raises(DataError, match=r"the data: .* unknown classes dog, emu, expected are .* ant, bee, cat$"):
        data.load_test(source(root), **SEEN)
    for path in root.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match="not one of its 6 test images can be read"):
        data.load_test(source(root), **SEEN | {"classes": ("bee", "dog", "emu")})


# ---- sources


def test_digits_are_the_embedded_set(tmp_path: Path) -> None:
    class_folders(Path("digits"), {"a": 4, "b": 4})  # such as a run folder of that name: not looked at
    dataset = data.load(Data(), 0)
    assert dataset.name == "digits"
    assert dataset.classes == tuple("0123456789")
    assert dataset.image_size == 8
    assert isinstance(dataset.train, Held)
    assert dataset.train.pixels.dtype == torch.uint8
    assert dataset.train.pixels.min() == 0
    assert dataset.train.pixels.max() == 255
    assert dataset.train.labels.dtype == torch.int64


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), arrays.digits()
    assert ours.train.labels.tolist() == theirs.target.tolist()
    assert list(ours.classes) == list(map(str, theirs.target_names))
    for index, image in enumerate(theirs.images):
        assert (np.asarray(ours.train.reader.open(index)) == np.rint(image * (255 / 16))[..., None]).all()


@pytest.mark.parametrize("test_name", ["test", "validation", "val", "valid"])
def test_split_folders(tmp_path: Path, test_name: str) -> None:
    class_folders(tmp_path / "d/train", {"cat": 10, "dog": 10})
    class_folders(tmp_path / f"d/{test_name}", {"dog": 3})
    dataset = data.load(source(tmp_path / "d"), 0)
    assert dataset.classes == ("cat", "dog")
    assert dataset.test.labels.tolist() == [1, 1, 1]
    assert len(dataset.train) == 18


def test_split_folder_called_test_is_preferred(tmp_path: Path) -> None:
    class_folders(tmp_path / "d/train", {"cat": 4, "dog": 4})
    class_folders(tmp_path / "d/val", {"cat": 1})
    class_folders(tmp_path / "d/test", {"cat": 3})
    assert len(data.load(source(tmp_path / "d"), 0).test) == 3


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_own_validation_split_folder(tmp_path: Path, name: str) -> None:
    class_folders(tmp_path / "d/train", {"cat": 4, "dog": 4})
    class_folders(tmp_path / f"d/{name}", {"cat": 1, "dog": 2})
    class_folders(tmp_path / "d/test", {"cat": 3})
    dataset = data.load(source(tmp_path / "d"), 0)
    assert dataset.validation is not None
    assert dataset.validation.labels.tolist() == [0, 1, 1]
    assert (len(dataset.train), len(dataset.test)) == (8, 3)
    without = data.load(source(tmp_path / "d", validation=0), 0)
    assert without.validation is None
    assert (len(without.train), len(without.test)) == (8, 3)


@pytest.mark.parametrize(("secret", "carved"), [(False, False), (True, True)])
def test_own_validation_split_of_a_table(tmp_path: Path, secret: bool, carved: bool) -> None:
    splits = {"train": [0, 1] * 10, "validation": [-1] * 3 if secret else [1, 0, 2], "test": [1, 1]}
    splits["train"] += [2]
    for name, labels in splits.items():
        columns = {"p": pictures(len(labels)), "label": labels}
        parquet(tmp_path / f"d/{name}.parquet", columns, p=PICTURE, label=LABEL)
    dataset = data.load(source(tmp_path / "d"), 0)
    assert dataset.test.labels.tolist() == [1, 1]
    assert dataset.validation is not None
    assert sorted(dataset.validation.labels.tolist()) == ([0, 1] if carved else [0, 1, 2])
    assert len(dataset.train) == (19 if carved else 21)
    without = data.load(source(tmp_path / "d", validation=0), 0)
    assert without.validation is None
    assert len(without.train) == 21


@pytest.mark.parametrize("names", [("Training", "Testing", "dev"), ("TRAIN", "Eval", "Val"), ("train", "TEST", "Dev")])
def test_split_folders_by_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, count in zip(names, (4, 3, 2), strict=True):
        class_folders(tmp_path / "d" / name, {"cat": count, "dog": count})
    dataset = data.load(source(tmp_path / "d"), 0)
    assert dataset.classes == ("cat", "dog")
    assert dataset.validation is not None
    assert [len(part) for part in (dataset.train, dataset.test, dataset.validation)] == [8, 6, 4]


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"training/indoors": 4, "training/outdoors": 4, "match": 4})
    assert data.load(source(root), 0).classes == ("match", "training")


def test_classes_may_have_folders(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {f"{name}/images": 4 for name in "abc"})
    assert data.load(source(root), 0).classes == ("a", "b", "c")
    root = class_folders(tmp_path / "e", {"cat/indoors": 4, "cat/wild": 4, "dog/indoors": 4, "dog/outdoors": 4})
    assert data.load(source(root), 0).classes == ("cat", "dog")


def tiny_imagenet(root: Path) -> Path:
    """As Tiny ImageNet comes: boxes beside the training images, labels of the validation in a file, a secret test."""
    class_folders(root / "train", {"n01/images": 6, "n02/images": 6})
    (root / "train/n01/n01_boxes.txt").write_text("0.png\t0\t0\t7\t7\n")
    class_folders(root, {"val/images": 4, "test/images": 3})
    wnids = ("n02", "n01", "n02", "n02")
    lines = "".join(f"{i}.png\t{wnid}\t0\t0\t7\t7\n" for i, wnid in enumerate(wnids))
    (root / "val/val_annotations.txt").write_text(lines)
    (root / "wnids.txt").write_text("n01\nn02\n")
    return root


@pytest.mark.parametrize("secret", [True, False])
def test_tiny_imagenet_as_it_comes(tmp_path: Path, secret: bool, caplog: pytest.LogCaptureFixture) -> None:
    root = tiny_imagenet(tmp_path / "d")
    if not secret:
        shutil.rmtree(root / "test")
    dataset = data.load(source(root, validation=0, memory_mb=0), 0)
    assert dataset.classes == ("n01", "n02")
    assert (len(dataset.train), dataset.validation) == (12, None)
    assert isinstance(dataset.test, Stored)
    assert dataset.test.labels.tolist() == [0, 1, 1, 1]  # by class, as if they were in class folders
    names = [dataset.test.files.reader.name(i) for i in original(dataset.test)]
    assert names == [f"{root}/val/images/{i}.png" for i in (1, 0, 2, 3)]
    said = "test: passed over, as its images are in no folder of a training class; to use it, sort them into test/<cl"
    assert (said in caplog.text) == secret


def test_labels_in_a_file_are_checked(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "d")
    write(root / "val/images/4.png")
    with pytest.raises(DataError, match=r"d/val: images/4.png has no line in val_annotations.txt; label it there, or"):
        data.load(source(root), 0)
    with (root / "val/val_annotations.txt").open("a") as file:
        file.write("4.png\tn03\t0\t0\t7\t7\n")
    with pytest.raises(DataError, match="d/val: classes without training images: n03"):
        data.load(source(root), 0)


@pytest.mark.parametrize("folder", ["val", "val/images"])
def test_a_split_that_is_not_sorted_is_passed_over(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path / "d", {"train/a": 5, "train/b": 5, folder: 3})
    assert len(data.load(source(root, validation=0), 0).test) == 2  # set aside
    assert "d/val: passed over" in caplog.text


def test_class_folders_of_any_depth_and_extension(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for suffix in ("jpg", "JPEG", "png", "bmp", "webp", "gif", "ppm", "tif", "TIFF"):
        write(root / "dog" / "deep" / f"{suffix}.{suffix}")
    write(root / "train" / "a.png")  # a class may be called train
    write(root / "train" / "b.png")
    write(root / ".hidden" / "a.png")
    write(root / "dog" / ".hidden" / "a.png")
    write(root / "dog" / ".a.png")
    (root / "dog" / "readme.txt").write_text("not an image")
    (root / "labels.csv").write_text("")
    dataset = data.load(source(root, validation=0), 0)
    assert dataset.classes == ("dog", "train")
    assert torch.cat([dataset.train.labels, dataset.test.labels]).bincount().tolist() == [9, 2]


def pixels_of(tmp_path: Path, name: str, make: Callable[[Path], object]) -> torch.Tensor:
    """What becomes of one image: uint8 [3, S, S]."""
    root = class_folders(tmp_path / "d", {"b": 4})
    (root / "a").mkdir()
    make(root / "a" / name)
    images = data.load(source(root, validation=0, corrupt_limit=0, test=0.5), 0).train
    assert isinstance(images, Held)
    return images.pixels[images.labels == 0][0]


def test_grey_alpha_palette_and_deep_images_become_rgb(tmp_path: Path) -> None:
    def of(name: str, make: Callable[[Path], object]) -> list[int]:
        pixels = pixels_of(tmp_path / re.sub(r"\W", "_", name), name, make)
        assert torch.equal(pixels, pixels[:, :1, :1].expand(3, 8, 8))
        return pixels[:, 0, 0].tolist()

    def palette(path: Path) -> None:
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 9, 8, 7])
        image.save(path, transparency=bytes([0, 128]))

    assert of("grey.png", lambda p: write(p, 77, mode="L")) == [77, 77, 77]
    assert of("grey_alpha.png", lambda p: write(p, (77, 5), mode="LA")) == [77, 77, 77]
    assert of("alpha.png", lambda p: write(p, (1, 2, 3, 4), mode="RGBA")) == [1, 2, 3]
    assert of("palette.png", palette) == [9, 8, 7]
    assert of("bits.png", lambda p: write(p, 1, mode="1")) == [255, 255, 255]
    assert of("deep.png", lambda p: write(p, 200 * 256 + 3, mode="I;16")) == [200, 200, 200]
    assert of("deep.tif", lambda p: write(p, 50 * 256, mode="I;16")) == [50, 50, 50]
    with pytest.raises(DataError, match="pixels are 32-bit integers without a known range; store 8 or 16 bits"):
        of("integers.tif", lambda p: write(p, 77, mode="I"))
    assert of("cmyk.tif", lambda p: write(p, (0, 255, 255, 0), mode="CMYK")) == [255, 0, 0]


def test_rotated_photographs_are_turned_upright(tmp_path: Path) -> None:
    def rotated(path: Path) -> None:
        image = Image.new("RGB", (8, 8))
        image.paste((255, 255, 255), (0, 0, 4, 8))  # white on the left as stored
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise: white on top
        image.save(path, exif=exif)

    pixels = pixels_of(tmp_path, "photo.png", rotated)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 0).all()


def test_image_size_follows_the_images(tmp_path: Path) -> None:
    def size_of(*sizes: tuple[int, int], **keys: Any) -> int:
        root = tmp_path / "_".join(f"{w}x{h}" for w, h in sizes)
        for name in "ab":
            for i, size in enumerate(sizes):
                write(root / name / f"{i}.png", size=size)
        return data.load(source(root, validation=0, test=0.2, memory_mb=1, **keys), 0).image_size

    assert size_of((20, 20), (20, 20), (20, 20)) == 20
    assert size_of((10, 12), (30, 20), (30, 20), (30, 20)) == 20
    assert size_of((300, 300), (300, 300)) == 224
    assert size_of((300, 250), (230, 500)) == 224
    assert size_of((20, 20), (20, 20), image_size=16) == 16


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_other_sizes_are_resized_and_cropped_in_the_middle(tmp_path: Path, memory_mb: int) -> None:
    for name in "ab":
        for i in range(4):
            path = write(tmp_path / "d" / name / f"{i}.png", (255, 0, 0), size=(64, 32))
            with Image.open(path) as image:
                image.paste((0, 255, 0), (16, 0, 48, 32))  # a green square in the middle, red beside it
                image.save(path)
    section = source(tmp_path / "d", image_size=16, memory_mb=memory_mb, validation=0, test=0.5, workers=0)
    dataset = data.load(section, 0)
    x, _ = next(data.eval_batches(dataset, dataset.test, 4, CPU))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    inside = (x * std + mean)[:, :, 2:-2, 2:-2]  # the seams are blurred
    assert x.shape == (4, 3, 16, 16)
    torch.testing.assert_close(inside[:, 1], torch.ones(4, 12, 12), atol=0.01, rtol=0)
    torch.testing.assert_close(inside[:, 0], torch.zeros(4, 12, 12), atol=0.01, rtol=0)
    setup = recipe({"crop": "none"}, data=section.model_dump(), train={"batch_size": 4})
    assert batches(dataset, setup)[0][0].shape == (4, 3, 16, 16)


def parquet(path: Path, columns: dict[str, list[Any]], **features: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {k: v for k, v in features.items() if k in columns}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(path)
    return path.parent


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(n)]


LABEL, PICTURE = datasets.ClassLabel(names=["cat", "dog", "emu"]), datasets.Image()
TEXT, WHOLE = datasets.Value("string"), datasets.Value("int64")


def test_parquet_folder_with_class_names(tmp_path: Path) -> None:
    labels = [0, 1, 2, 1] * 5
    parquet(tmp_path / "d/data/train-0.parquet", {"img": pictures(20), "y": labels}, img=PICTURE, y=LABEL)
    parquet(tmp_path / "d/data/test-0.parquet", {"img": pictures(3), "y": [2, 1, 0]}, img=PICTURE, y=LABEL)
    dataset = data.load(source(tmp_path / "d", validation=0), 0)
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.train.labels.tolist() == labels
    assert dataset.test.labels.tolist() == [2, 1, 0]
    assert isinstance(dataset.train, Held)
    assert dataset.train.pixels[:, 0, 4, 4].tolist() == list(range(20))
    assert dataset.train.pixels[:, 1:].max() == 0


@forks
def test_parquet_read_by_workers(tmp_path: Path) -> None:
    parquet(tmp_path / "d/train.parquet", {"image": pictures(20), "label": [0, 1] * 10}, image=PICTURE, label=LABEL)
    section = source(tmp_path / "d", memory_mb=0, workers=2, validation=0)
    held, stored = data.load(source(tmp_path / "d", validation=0), 0), data.load(section, 0)
    assert held.mean == stored.mean
    setup = recipe({"crop": "none"}, train={"batch_size": 4}, data=section.model_dump())
    one, two = batches(held, recipe({"crop": "none"}, train={"batch_size": 4})), batches(stored, setup)
    assert same(one, two)  # images of one colour look the same flipped


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "expected"),
    [
        (TEXT, ["b", "a", "c", "a"], ("a", "b", "c"), [1, 0, 2, 0]),
        (WHOLE, [30, 7, 7, 100], ("7", "30", "100"), [1, 0, 0, 2]),
        (datasets.Value("bool"), [True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_labels_without_class_names(
    tmp_path: Path, kind: Any, labels: list[Any], classes: tuple[str, ...], expected: list[int]
) -> None:
    parquet(tmp_path / "d/train.parquet", {"p": pictures(8), "label": labels * 2}, p=PICTURE, label=kind)
    parquet(tmp_path / "d/test.parquet", {"p": pictures(4), "label": labels}, p=PICTURE, label=kind)
    dataset = data.load(source(tmp_path / "d", validation=0), 0)
    assert dataset.classes == classes
    assert dataset.test.labels.tolist() == expected


def test_label_column_is_found_or_named(tmp_path: Path) -> None:
    columns = {"p": pictures(6), "coarse_label": [0, 1] * 3, "fine_label": [0, 1, 2] * 2, "note": ["x"] * 6}
    parquet(tmp_path / "d/train.parquet", columns, p=PICTURE, coarse_label=LABEL, fine_label=LABEL, note=TEXT)
    assert data.load(source(tmp_path / "d", validation=0, test=0.5), 0).train.labels.unique().tolist() == [0, 1, 2]
    named = data.load(source(tmp_path / "d", validation=0, test=0.5, label_column="coarse_label"), 0)
    assert named.train.labels.unique().tolist() == [0, 1]


def test_image_column_can_be_named(tmp_path: Path) -> None:
    bright = [Image.new("RGB", (8, 8), (200, 0, 0)) for _ in range(4)]
    columns = {"p": pictures(4), "q": bright, "label": [0, 1] * 2}
    parquet(tmp_path / "d/train.parquet", columns, p=PICTURE, q=PICTURE, label=LABEL)
    dataset = data.load(source(tmp_path / "d", validation=0, test=0.5, image_column="q"), 0)
    assert isinstance(dataset.train, Held)
    assert dataset.train.pixels[:, 0].unique().tolist() == [200]


def test_test_split_whose_labels_are_secret_is_passed_over(tmp_path: Path) -> None:
    for name, labels in (("train", [0, 1] * 4), ("validation", [1, 0, 1]), ("test", [-1, -1])):
        columns = {"p": pictures(len(labels)), "label": labels}
        parquet(tmp_path / f"d/{name}.parquet", columns, p=PICTURE, label=LABEL)
    assert data.load(source(tmp_path / "d", validation=0), 0).test.labels.tolist() == [1, 0, 1]


def test_a_name_is_a_folder_here_or_in_ddnn_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "all/cifar10", {"a": 4, "b": 4})
    class_folders(tmp_path / "all/group/mine", {"c": 4, "d": 4})
    monkeypatch.setenv("DDNN_DATA", str(tmp_path / "all"))
    assert data.load(source("cifar10"), 0).classes == ("a", "b")
    assert data.load(source("group/mine"), 0).classes == ("c", "d")
    class_folders(Path("group/mine"), {"e": 4, "f": 4})  # the working folder comes first
    assert data.load(source("group/mine"), 0).classes == ("e", "f")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_from_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert download
            assert root == tmp_path / "home/.cache/ddnn"
            self.classes = ["plane", "car"]
            self.targets = [0, 1] * (10 if train else 3)
            self.data = np.arange(len(self.targets), dtype=np.uint8).repeat(32 * 32 * 3).reshape(-1, 32, 32, 3)

    monkeypatch.setattr(torchvision.datasets, name.upper(), Tiny)
    dataset = data.load(source(name), 0)
    assert (dataset.name, dataset.classes, dataset.image_size) == (name, ("plane", "car"), 32)
    assert isinstance(dataset.test, Held)
    assert dataset.test.pixels[:, 2, 5, 5].tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test.labels.tolist() == [0, 1] * 3


def test_failed_download_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **keys: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    monkeypatch.setenv("DDNN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"cifar100: no folder .*nowhere.*no route to host.*set DDNN_DATA to a folder"):
        data.load(source("cifar100"), 0)


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": pictures(12), "label": [0, 1] * 6}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(image=PICTURE, label=LABEL))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or {"train": rows})
    assert len(data.load(source("owner/some.set", test=0.5, validation=0), 0).test) == 6
    assert asked == ["owner/some.set"]

    def absent(name: str) -> None:
        raise FileNotFoundError(f"no {name}\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(DataError, match=r"^data.source='owner/other': .*no owner/other\); allowed are digits, cifar10"):
        data.load(source("owner/other"), 0)


# ---- unreadable images


def broken(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:45])  # within the first bytes of pixels
    return str(path)


def test_unreadable_images_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = class_folders(tmp_path / "d", {"a": 10, "b": 10})
    bad = [broken(root / "a/3.png"), broken(root / "b/5.png")]
    (root / "b/6.png").write_text("no image at all")
    bad.append(str(root / "b/6.png"))
    dataset = data.load(source(root, validation=0, corrupt_limit=3), 0)
    assert sorted(line.split(": ")[0] for line in dataset.corrupt) == sorted(bad)
    assert len(dataset.train) + len(dataset.test) == 17
    assert [r.name for r in caplog.records] == ["ddnn.data"] * 3
    assert all(f"skipped unreadable image {path}: " in caplog.text for path in bad)


def test_too_many_unreadable_images_are_an_error(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"a": 10, "b": 10})
    for i in range(6):
        broken(root / f"a/{i}.png")
    message = r"4 unreadable images so far, more than data.corrupt_limit=3 allows, the first: .*\.png \(.*; repair"
    with pytest.raises(DataError, match=message):
        data.load(source(root, validation=0, corrupt_limit=3), 0)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_met_by_workers(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    root = class_folders(tmp_path / "d", {"a": 12, "b": 12})
    section = source(root, validation=0, test=0.5, corrupt_limit=1, memory_mb=0, workers=workers, image_size=8)
    dataset = data.load(section, 0)
    assert dataset.corrupt == ()
    assert isinstance(dataset.train, Stored)
    first, second = (Path(dataset.train.files.reader.name(i)) for i in original(dataset.train)[:2])
    broken(first)
    setup = recipe({"policy": "randaugment"}, train={"batch_size": 4}, data=section.model_dump())
    for epoch in range(2):  # the same image is counted once
        seen = batches(dataset, setup, epoch=epoch)
        assert sorted(len(x) for x, _ in seen) == [3, 4, 4]
        assert all(len(x) == len(target) for x, target in seen)
    evaluated = list(data.eval_batches(dataset, dataset.train, 5, CPU))
    assert torch.equal(torch.cat([label for _, label in evaluated]), dataset.train.labels[1:])
    assert [r.getMessage().startswith(f"skipped unreadable image {first}: ") for r in caplog.records] == [True]
    broken(second)
    with pytest.raises(DataError, match=r"2 unreadable images so far, more than data.corrupt_limit=1"):
        batches(dataset, setup)


def test_rows_without_image_are_unreadable(tmp_path: Path) -> None:
    columns = {"p": [None, *pictures(7)], "label": [0, 1] * 4}
    parquet(tmp_path / "d/train.parquet", columns, p=PICTURE, label=LABEL)
    parquet(tmp_path / "d/test.parquet", {"p": pictures(2), "label": [0, 1]}, p=PICTURE, label=LABEL)
    dataset = data.load(source(tmp_path / "d", validation=0), 0)
    assert dataset.corrupt == ("train row 0: ValueError: the row has no image",)
    assert len(dataset.train) == 7


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("side", [11, 40])  # PIL warns up to twice its limit, then raises
def test_decompression_bombs_are_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Any, side: int
) -> None:
    root = class_folders(tmp_path / "d", {"a": 10, "b": 10})
    bomb = write(root / "a/bomb.png", size=(side, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        dataset = data.load(source(root, validation=0, image_size=8), 0)
    assert [line.split(": ")[0] for line in dataset.corrupt] == [str(bomb)]


# ---- errors


def make_one_class(root: Path) -> None:
    class_folders(root, {"a": 4})


def make_empty_class(root: Path) -> None:
    class_folders(root, {"a": 4, "b": 4})
    (root / "c").mkdir()


def make_unknown_test_class(root: Path) -> None:
    class_folders(root / "train", {"a": 4, "b": 4})
    class_folders(root / "test", {"a": 1, "zebra": 1})


def make_empty_test(root: Path) -> None:
    class_folders(root / "train", {"a": 4, "b": 4})
    (root / "test/a").mkdir(parents=True)


def make_unknown_validation_class(root: Path) -> None:
    for split, classes in (("train", "ab"), ("test", "ab"), ("val", "az")):
        class_folders(root / split, dict.fromkeys(classes, 2))


def make_table(
    labels: list[Any], kind: Any = LABEL, name: str = "label", split: str = "train"
) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        parquet(root / f"{split}.parquet", {"p": pictures(len(labels)), name: labels}, **{"p": PICTURE, name: kind})

    return make


def both(*makes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: [make(root) for make in makes] and None


def make_two_pictures(root: Path) -> None:
    columns = {"p": pictures(4), "q": pictures(4), "label": [0, 1] * 2}
    parquet(root / "train.parquet", columns, p=PICTURE, q=PICTURE, label=LABEL)


def make_no_picture(root: Path) -> None:
    parquet(root / "train.parquet", {"text": ["a", "b"], "label": [0, 1]}, text=TEXT, label=LABEL)


def make_broken_parquet(root: Path) -> None:
    root.mkdir()
    (root / "train.parquet").write_text("not parquet")


ERRORS: list[tuple[Callable[[Path], Any], dict[str, Any], str]] = [
    (
        Path.mkdir,
        {},
        r"no images \(\.jpg .*\) in class folders, no parquet files and no tar shards; allowed are <class>/\*\.jpg",
    ),
    (make_one_class, {}, "are of 1 class, at least 2 are needed"),
    (make_empty_class, {}, "class folders without images: c; fill or remove them"),
    (make_unknown_test_class, {}, "test: classes without training images: zebra"),
    (make_empty_test, {}, "test: no images"),
    (make_unknown_validation_class, {}, "val: classes without training images: z"),
    (
        lambda root: class_folders(root, {"train": 4, "test": 4}),
        {},
        r"its only folders are test, train, which are no classes; images must be in train/<class>/, and",
    ),
    (lambda root: class_folders(root, {"Train": 4, "Valid": 4}), {}, r"must be in train/<class>/"),
    (
        lambda root: class_folders(root, {"Training": 4, "Testing": 4}),
        {},
        r"are Testing, Training, which are no classes",
    ),
    (
        lambda root: class_folders(root, {f"{top}/{name}": 1 for top in ("Train", "training") for name in "ab"}),
        {},
        "the folders Train and training are all for training; keep one of them",
    ),
    (
        lambda root: class_folders(root, {f"{top}/{name}": 1 for top in ("seg_train", "seg_test") for name in "ab"}),
        {},
        r"seg_test, seg_train hold but the same folders \(a, b, ...\), so it isn't clear which are the classes",
    ),
    (
        both(make_table([0, 1] * 3), make_table([0], split="test"), make_table([2], split="validation")),
        {},
        "validation split has classes without training images: emu",
    ),
    (
        lambda root: class_folders(root, {"a": 4, "b": 4}),
        {"test": 0},
        "no test split of its own, so data.test must be above 0",
    ),
    (lambda root: class_folders(root, {"a": 1, "b": 1}), {}, r"no class has 2 images.*\(data.test\)"),
    (make_two_pictures, {}, r"several image columns \(p, q\) among p, q, label; name one by data.image_column"),
    (make_two_pictures, {"image_column": "r"}, "data.image_column='r' is not one of its columns: p, q, label"),
    (make_two_pictures, {"image_column": "p", "label_column": "r"}, "data.label_column='r' is not one of its columns"),
    (make_no_picture, {}, "no image column among text, label; name one by data.image_column"),
    (make_broken_parquet, {}, "its parquet files cannot be read"),
    (
        make_table([0, 1, 0, 1], WHOLE, name="kind"),
        {},
        "no label column among p, kind; name one by data.label_column, or",
    ),
    (make_table([0, None, 1, 0]), {}, "1 of 4 images of split train have no label in column 'label'"),
    (make_table([None, None]), {}, "no training image has a label in column 'label'"),
    (
        make_table([0.5, 1.5], datasets.Value("float32")),
        {},
        "labels in column 'label' are neither whole numbers nor texts",
    ),
    (make_table(["x", "x"], TEXT), {}, "are of 1 class, at least 2 are needed"),
    (
        both(make_table(["x", "y"] * 3, TEXT), make_table(["x", "new"], TEXT, split="test")),
        {},
        "split test has labels that are not training classes: new",
    ),
    (
        both(make_table([0, 1] * 3), make_table([0, 2], split="test")),
        {},
        "test split has classes without training images: emu",
    ),
    (
        both(make_table([0, 1] * 3, split="validation"), make_table([0, 1], split="test")),
        {},
        "no split called train among: ",
    ),
]


@pytest.mark.parametrize(("make", "keys", "message"), ERRORS, ids=[message[:40] for *_, message in ERRORS])
def test_errors_name_the_place_and_what_is_allowed(
    tmp_path: Path, make: Callable[[Path], Any], keys: dict[str, Any], message: str
) -> None:
    root = tmp_path / "the data"
    make(root)
    with pytest.raises(DataError, match=message) as error:
        data.load(source(root, **keys), 0)
    assert "the data" in str(error.value)


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "./no/folder", "~nobody/x", "a/b/c", "nothing.toml"])
def test_unknown_source(name: str) -> None:
    with pytest.raises(DataError, match=r"there is no such folder.*; allowed are digits, cifar10, cifar100, a folder"):
        data.load(source(name), 0)


@pytest.mark.parametrize("name", ["", " "])
def test_empty_source(name: str) -> None:
    class_folders(Path(), {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"^data.source is empty; allowed are digits"):
        data.load(source(name), 0)


@pytest.mark.parametrize("absolute", [False, True])
def test_source_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setenv("DDNN_DATA", str(tmp_path / "all"))
    path = write(tmp_path / "all/group/images.png")
    with pytest.raises(DataError, match=r"images.png': it is a file, not a folder; allowed are digits"):
        data.load(source(path if absolute else "group/images.png"), 0)


def test_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setenv("DDNN_DATA", str(tmp_path / "all"))
    (tmp_path / "all/there").mkdir(parents=True)
    Path("here").mkdir()
    for name in ("here/mine", "there/mine"):
        with pytest.raises(DataError, match=f"data.source='{name}': there is no such folder in the working folder or"):
            data.load(source(name), 0)


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", {"a": 2, "b": 2})
    for path in root.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match="none of the training images looked at can be read"):
        data.load(source(root, validation=0), 0)
    with pytest.raises(DataError, match="not one of its 2 training images can be read"):
        data.load(source(root, validation=0, test=0.5, image_size=8), 0)
    with pytest.raises(DataError, match="none of the training images looked at can be read"):
        data.load(source(root, validation=0, test=0.5, image_size=8, memory_mb=0), 0)


# ---- the real thing


@pytest.mark.data
@needs_cifar100
def test_some_of_cifar100() -> None:
    dataset = data.load(source("cifar100", limit=500), 0)
    assert (len(dataset.classes), dataset.image_size, len(dataset.train)) == (100, 32, 500)
    assert dataset.classes[0] == "apple"
    assert dataset.train.labels.bincount().tolist() == [5] * 100
    assert dataset.corrupt == ()


@pytest.mark.data
@pytest.mark.slow
@needs_cifar100
def test_all_of_cifar100() -> None:
    dataset = data.load(source("cifar100"), 0)
    assert dataset.validation is not None
    assert dataset.train.labels.bincount().tolist() == [450] * 100
    assert dataset.validation.labels.bincount().tolist() == [50] * 100
    assert dataset.test.labels.bincount().tolist() == [100] * 100
    assert isinstance(dataset.train, Held)
    recorded = "c71bf1e8645e7ff215d9872c27743425c18679498069c66c11fc00e38bdcadcd"  # by the runs in results/
    assert data.load(source("cifar100", validation=0), 0).is_of(recorded)
    assert dataset.mean == pytest.approx((0.5071, 0.4866, 0.4409), abs=2e-3)  # published, of all 50,000
    assert dataset.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=2e-3)
