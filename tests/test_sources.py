"""Tar shards, parquet and class folders, here and on other machines: the same images, in the same order."""

import functools
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddnn import data, recipe
from ddnn.data import sources
from ddnn.data.order import epoch_order
from ddnn.data.sets import Held, Images, Stored
from ddnn.data.sources import places, shards, tar_index
from ddnn.data.sources.recent import Recent
from ddnn.data.sources.texts import Texts
from ddnn.errors import DataError
from ddnn.recipe import Data, Recipe, parse

CPU = torch.device("cpu")
NAMES = ["ant", "bee", "cat"]
FORMATS = ["folders", "parquet", "tar"]
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.delenv("DDNN_DATA", raising=False)
    monkeypatch.setenv("DDNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSE", 0.001)
    yield
    fsspec.filesystem("memory").store.clear()


@functools.cache
def pictures(n: int = 60) -> list[tuple[bytes, int]]:
    """Encoded images of noise, each unlike all others, with labels that are sorted as class folders are."""
    generator = np.random.default_rng(0)
    found = []
    for i in range(n):
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(content, "PNG")
        found.append((content.getvalue(), i * 3 // n))
    return found


def add(archive: tarfile.TarFile, name: str, content: bytes | str) -> None:
    about = tarfile.TarInfo(name)
    content = content if isinstance(content, bytes) else content.encode()
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def write_tar(path: Path, members: list[tuple[str, bytes | str]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, content in members:
            add(archive, name, content)
    return path


def samples(first: int, last: int) -> list[tuple[str, bytes | str]]:
    return [
        m
        for i in range(first, last)
        for m in ((f"{i:04}.cls", NAMES[pictures()[i][1]]), (f"{i:04}.png", pictures()[i][0]))
    ]


def make(form: str, root: Path, rows: int = 5) -> Path:
    """The same data set in any form."""
    root.mkdir(parents=True)
    n = len(pictures())
    if form == "folders":
        for i, (content, label) in enumerate(pictures()):
            (root / NAMES[label]).mkdir(exist_ok=True)
            (root / NAMES[label] / f"{i:04}.png").write_bytes(content)
    elif form == "tar":
        for shard, first in enumerate(range(0, n, 17)):
            write_tar(root / f"train-{shard:03}.tar", samples(first, min(n, first + 17)))
    else:
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
        for shard, first in enumerate(range(0, n, 25)):
            part = pictures()[first : first + 25]
            columns = {"image": [{"bytes": c, "path": None} for c, _ in part], "label": [label for _, label in part]}
            table = datasets.Dataset.from_dict(columns, features=features).data.table
            pyarrow.parquet.write_table(table, root / f"train-{shard:03}.parquet", row_group_size=rows)
    return root


def to_memory(root: Path, url: str = "memory://bucket/set") -> str:
    """A folder's content in a file system that is not this machine's as far as ddnn can tell."""
    filesystem = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{url}/{path.relative_to(root)}", path.read_bytes())
    return url


def section(source: Path | str, **keys: Any) -> Data:
    return Data(**{"source": str(source), "memory_mb": 0, "workers": 0, "image_size": 12, "shuffle_window": 32, **keys})


def setup(given: Data, **augment: Any) -> Recipe:
    return parse({"data": given.model_dump(exclude_none=True), "train": {"batch_size": 4}, "augment": augment})


def epoch(given: Data, number: int = 0, start: int = 0, **augment: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dataset = data.load(given, 0)
    return list(data.train_batches(dataset, setup(given, **augment), epoch=number, start=start, device=CPU))


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(left, right, strict=True)
    )


# ---- one data set in every form and place


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_batches_do_not_depend_on_form_and_place(form: str, remote: bool, tmp_path: Path) -> None:
    expected = data.load(section(make("folders", tmp_path / "plain")), 0)
    root = make(form, tmp_path / "other")
    given = section(to_memory(root) if remote else root)
    dataset = data.load(given, 0)
    assert dataset.classes == expected.classes == tuple(NAMES)
    assert dataset.former == expected.former
    assert dataset.fingerprint == data.load(section(root), 0).fingerprint
    assert (dataset.mean, dataset.std) == (expected.mean, expected.std)
    for part in ("train", "validation", "test"):
        left, right = (list(data.eval_batches(d, getattr(d, part), 7, CPU)) for d in (expected, dataset))
        assert same(left, right)
    left, right = (list(data.train_batches(d, setup(given), epoch=1, device=CPU)) for d in (expected, dataset))
    assert same(left, right)
    held = data.load(given.model_copy(update={"memory_mb": 10}), 0)
    assert isinstance(held.train, Held)
    assert same(
        list(data.train_batches(held, setup(given, policy="trivialaugment"), epoch=1, device=CPU)),
        list(data.train_batches(dataset, setup(given, policy="trivialaugment"), epoch=1, device=CPU)),
    )


@forks
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("form", "shuffle"),
    [("folders", "global"), ("tar", "global"), ("tar", "chunks"), ("parquet", "global"), ("parquet", "chunks")],
)
def test_workers_and_a_stop_change_nothing(form: str, shuffle: str, remote: bool, tmp_path: Path) -> None:
    root = make(form, tmp_path / "set")
    source = to_memory(root) if remote else root
    seen = []
    for workers in (0, 1, 3):
        given = section(source, workers=workers, shuffle=shuffle, validation=0, test=0.1)
        whole = epoch(given, policy="trivialaugment", erasing=0.3)
        assert len(whole) == 13
        assert same(epoch(given, start=5, policy="trivialaugment", erasing=0.3), whole[5:])  # bitwise
        seen.append(whole)
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])
    assert not same(epoch(given, number=1), seen[0])


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_images_can_be_sent_to_a_process_that_starts_from_nothing(form: str, remote: bool, tmp_path: Path) -> None:
    """As where workers are not forked; what the main process has read is not sent along."""
    root = make(form, tmp_path / "set")
    dataset = data.load(section(to_memory(root) if remote else root), 0)
    expected = [dataset.train.picture(i).tobytes() for i in range(10)]
    sent = pickle.dumps(dataset.train)
    assert [pickle.loads(sent).picture(i).tobytes() for i in range(10)] == expected
    if form != "parquet":  # whose statistics are the least and the greatest image
        assert pictures()[0][0][:100] not in sent


@pytest.mark.parametrize("remote", [False, True])
def test_files_that_are_no_images_by_their_names_are_told_of(
    remote: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = make("folders", tmp_path / "set")
    first = place / NAMES[0]
    for name in ("1.heic", "2.HEIC", "x/3.avif", "4", "labels.txt", ".5.heic"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).touch()
    data.load(section(to_memory(place, "memory://bucket/odd") if remote else place), 0)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.endswith(": 2 .heic, 1 no ending, 1 .avif; convert those that are images")
    caplog.clear()
    (place / "val").mkdir()
    (place / "val" / "9.heic").touch()
    (place / "val" / "9.png").write_bytes(pictures()[0][0])
    (place / "train").mkdir()
    for name in NAMES:
        (place / name).rename(place / "train" / name)
    data.load(section(to_memory(place, "memory://bucket/odd2") if remote else place), 0)
    assert sum(": 3 .heic, 1 no ending, 1 .avif;" in record.getMessage() for record in caplog.records) == 1
    for name in NAMES:
        (place / "train" / name).rename(place / name)
    shutil.rmtree(place / "train")
    shutil.rmtree(place / "val")
    for path in first.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=rf"without images: {first.name}; fill or remove them: files .* 2 \.heic"):
        data.load(section(place), 0)


@pytest.mark.parametrize("shuffle", ["global", "chunks"])
@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_fingerprint_tells_images_apart_by_size(
    form: str, shuffle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data.load(section(make(form, tmp_path / "before")), 0)
    others = [(pictures()[-1][0] + b"more", 0), *pictures()[1:]]
    monkeypatch.setitem(globals(), "pictures", lambda: others)
    after = data.load(section(make(form, tmp_path / "after"), shuffle=shuffle), 0)
    assert after.former == before.former
    assert after.fingerprint != before.fingerprint


# ---- the order with chunks


def literal_order(chunk: list[int], window: int, seed: int, number: int) -> list[int]:
    """`epoch_order`, written out."""
    generator = torch.Generator().manual_seed(data.stream_key(seed, "order", number))
    mixed = torch.randperm(len(chunk), generator=generator).tolist()
    names = sorted(set(chunk))
    windows: list[set[int]] = []
    count = 0
    for each in torch.randperm(len(names), generator=generator).tolist():
        at = count // window
        windows += [set() for _ in range(at + 1 - len(windows))]
        windows[at].add(names[each])
        count += chunk.count(names[each])
    return [i for each in windows for i in mixed if chunk[i] in each]


@pytest.mark.parametrize(
    ("sizes", "window"), [([3] * 40, 32), ([1, 50, 2, 9, 9, 30, 70, 4], 32), ([200], 32), ([5] * 8, 64)]
)
def test_chunks_are_mixed_window_by_window(sizes: list[int], window: int) -> None:
    numbers = torch.arange(len(sizes)) * 2 + 1  # some chunks may be in another split
    chunk = numbers.repeat_interleave(torch.tensor(sizes))
    images = Images(torch.zeros(len(chunk), dtype=torch.int64), chunk=chunk)
    given = parse({"data": {"shuffle": "chunks", "shuffle_window": window}, "train": {"seed": 3}})
    orders = [epoch_order(images, given, number) for number in range(3)]
    for number, order in enumerate(orders):
        assert order.tolist() == literal_order(chunk.tolist(), window, 3, number)
        assert order.sort().values.tolist() == list(range(len(chunk)))  # each once
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_chunk_is_read_once_in_an_epoch(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = section(make(form, tmp_path / "set"), shuffle="chunks", validation=0, test=0.05)
    dataset = data.load(given, 0)
    assert isinstance(dataset.train, Stored)
    starts = dataset.train.files.reader.chunks
    assert starts is not None
    if form == "parquet":
        assert starts.tolist() == list(range(0, 60, 5))
    else:
        assert len(starts) == 60  # a window of 32 images, so chunks of one
    loads = []
    get = Recent.get

    def counted(self: Recent[Any], number: int, images: int, load: Callable[[], Any]) -> Any:
        return get(self, number, images, lambda: (loads.append(number), load())[1])

    monkeypatch.setattr(Recent, "get", counted)
    seen = list(data.train_batches(dataset, setup(given), epoch=0, device=CPU))
    assert len(seen) == 14
    assert len(loads) == len(set(loads))
    assert sorted(loads) == sorted(set(dataset.train.chunk.tolist()) & set(loads))  # type: ignore[union-attr]


def test_chunks_of_a_tar_lie_in_one_shard(tmp_path: Path) -> None:
    root = make("tar", tmp_path / "set")
    reader = sources.find(section(root, shuffle="chunks", shuffle_window=32 * 7)).train.reader
    assert reader.chunks is not None
    assert reader.chunks.tolist() == [0, 7, 14, 17, 24, 31, 34, 41, 48, 51, 58]
    plain = sources.find(section(root)).train.reader
    assert plain.chunks is None
    for i in range(60):
        assert plain.open(i).tobytes() == reader.open(i).tobytes() == Image.open(io.BytesIO(pictures()[i][0])).tobytes()


@pytest.mark.parametrize("source", ["digits", "folders"])
def test_chunks_are_for_shards(source: str, tmp_path: Path) -> None:
    place = make("folders", tmp_path / "set") if source == "folders" else source
    with pytest.raises(DataError, match=r"data.shuffle='chunks' is for parquet files and tar shards.*='global'"):
        data.load(section(place, shuffle="chunks"), 0)


def test_what_was_trained_in_chunks_is_evaluated_on_anything(tmp_path: Path) -> None:
    place = make("folders", tmp_path / "set")
    classes = data.load(section(place), 0).classes
    expected, found = (
        data.load_test(section(place, shuffle=order), classes=classes, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
        for order in ("global", "chunks")
    )
    assert torch.equal(expected.test.labels, found.test.labels)


def test_recipe_fields_are_checked(tmp_path: Path) -> None:
    from ddnn.errors import RecipeError

    with pytest.raises(RecipeError, match=r"data.shuffle: .*'global' or 'chunks'"):
        recipe.load("digits", ["data.shuffle=shards"])
    with pytest.raises(RecipeError, match=r"data.shuffle_window: .*greater than or equal to 32"):
        recipe.load("digits", ["data.shuffle_window=1"])


def test_recent_holds_few(tmp_path: Path) -> None:
    recent: Recent[str] = Recent(10)
    loads: list[int] = []

    def get(number: int, images: int = 4) -> None:
        assert recent.get(number, images, lambda: (loads.append(number), str(number))[1]) == str(number)

    for number in (1, 2, 1, 3, 1, 2, 3):
        get(number)
    assert loads == [1, 2, 3, 2, 3]  # 2 and 3 had been the longest ago
    get(4, images=100)  # more than the limit: held by itself
    get(4, images=100)
    get(3)
    assert loads[5:] == [4, 3]


# ---- tar shards


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("form", ["cls", "json"])
def test_every_kind_of_tar(kind: int, form: str, tmp_path: Path) -> None:
    deep = "folder/" * 16 + "x" * 40  # longer than a plain header holds
    members: list[tuple[str, bytes | str]] = [("__meta__.json", "{}"), (".hidden.png", b"")]
    for i in range(12):
        key = f"{deep}/é{i}" if kind != tarfile.USTAR_FORMAT else f"{'folder/' * 16}{i}"
        label = str(i % 3 + 7) if form == "cls" else json.dumps({"text": "?", "label": i % 3 + 7})
        members += [(f"{key}.seg.PNG", b"another picture"), (f"{key}.PNG", pictures()[i][0]), (f"{key}.{form}", label)]
    path = write_tar(tmp_path / "d/a.tar", members, format=kind)
    found = sources.find(section(tmp_path / "d"))
    assert found.classes == ("7", "8", "9")
    assert found.train.labels.tolist() == [0, 1, 2] * 4
    with tarfile.open(path) as archive:  # the reference
        expected = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    for i in range(12):
        shard, _, name = found.train.reader.name(i).partition(":")
        assert shard == str(path)
        content = expected[name.removesuffix(".png") + ".PNG"]
        assert found.train.reader.open(i).tobytes() == Image.open(io.BytesIO(content)).tobytes()


def test_labels_of_a_json_by_name_and_classes_sorted_as_numbers(tmp_path: Path) -> None:
    members = [
        m
        for i in range(6)
        for m in (
            (f"{i}.json", json.dumps({"label": "x", "kind": [10, 9, 100][i % 3]})),
            (f"{i}.cls", "z"),
            (f"{i}.png", pictures()[i][0]),
        )
    ]
    write_tar(tmp_path / "d/a.tar", members)
    assert sources.find(section(tmp_path / "d", label_column="kind")).classes == ("9", "10", "100")
    assert sources.find(section(tmp_path / "d")).classes == ("z",)


def test_splits_of_shards_go_by_their_names(tmp_path: Path) -> None:
    for name, first in (("train-0", 15), ("train-1", 35), ("imagenet1k-val-00", 40), ("test/0", 50)):
        write_tar(tmp_path / f"d/{name}.tar", samples(first, first + 10))
    dataset = data.load(section(tmp_path / "d"), 0)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [20, 10, 10]  # type: ignore[arg-type]
    write_tar(tmp_path / "d/test/1.tar", [("a.png", pictures()[0][0]), ("a.cls", "zebra")])
    with pytest.raises(DataError, match="split test has labels that are not training classes: zebra"):
        data.load(section(tmp_path / "d"), 0)


def test_shards_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("tar", tmp_path / "all/set")
    assert len(sources.find(section(root / "train-{000..003}.tar")).train) == 60
    assert len(sources.find(section(root / "train-00{1,2}.tar")).train) == 34
    assert len(sources.find(section(f"file://{root}/train-000.tar")).train) == 17
    monkeypatch.setenv("DDNN_DATA", str(tmp_path / "all"))
    assert len(sources.find(section("set/train-{000..001}.tar")).train) == 34
    monkeypatch.chdir(tmp_path / "all")
    assert (
        recipe.load("digits", ["data.source=set/train-{000..001}.tar"]).data.source == f"{root}/train-{{000..001}}.tar"
    )
    with pytest.raises(DataError, match=r"train-004.tar: it cannot be read \(No such file"):
        sources.find(section(root / "train-{000..004}.tar"))
    with pytest.raises(DataError, match="parquet files and tar shards together; name one kind"):
        sources.find(section(root / "{train-000.tar,a.parquet}"))


def test_braces() -> None:
    assert places.expanded("a/{08..11}-{x,y}.tar") == [f"a/{n}-{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"]
    assert places.expanded("{9..10}") == ["9", "10"]
    assert places.expanded("plain") == ["plain"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("a.tar", "train"),
        ("train/val-0.tar", "validation"),
        ("test/0.tar", "test"),
        ("data/dev_00.parquet", "validation"),
        ("latest/x.tar", "train"),
        ("Testing-1.tar", "test"),
        ("evaluation.parquet", "test"),
    ],
)
def test_split_of(path: str, split: str) -> None:
    assert shards.split_of(path) == split


def test_class_folders_win_over_an_archive_beside_them(tmp_path: Path) -> None:
    root = make("folders", tmp_path / "set")
    write_tar(root / "original.tar", [("readme", "")])
    assert len(sources.find(section(root)).train) == 60


GOOD: list[tuple[str, bytes | str]] = [("a.png", b"x"), ("a.cls", "1")]


def cut(at: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = write_tar(root / "a.tar", [("a.png", b"x" * 2000), ("a.cls", "1")])
        path.write_bytes(path.read_bytes()[:at])

    return change


def scribbled(root: Path) -> None:
    path = write_tar(root / "a.tar", [("a.png", b"x" * 2000), ("a.cls", "1")])
    content = bytearray(path.read_bytes())
    content[2560:2600] = b"?" * 40
    content[2560 + 257 : 2560 + 263] = b"?" * 6
    path.write_bytes(content)


BROKEN: list[tuple[Callable[[Path], Any], dict[str, Any], str]] = [
    (cut(700), {}, r"a.tar: the shard is cut short: a.png goes on beyond byte 700"),
    (cut(3072), {}, r"a.tar: the shard is cut short: a.cls goes on beyond byte 3072"),
    (cut(3584), {}, r"a.tar: the shard is cut short: it ends at byte 3584 without an end mark"),
    (scribbled, {}, r"a.tar: no tar header where one should be, at byte 2560"),
    (lambda root: (root.mkdir(), (root / "a.tar").write_bytes(b"")), {}, "cut short: it ends at byte 0"),
    (lambda root: write_tar(root / "a.tar", []), {}, "not one sample in its 1 shards"),
    (
        lambda root: write_tar(root / "a.tar", [("a.png", b"x")]),
        {},
        r"a.tar: sample a has no label, only .png; it must be in",
    ),
    (lambda root: write_tar(root / "a.tar", GOOD), {"label_column": "kind"}, "sample a has no label.*in its .json"),
    (
        lambda root: write_tar(root / "a.tar", [("a.cls", "1")]),
        {},
        r"a.tar: sample a has no image \(.jpg .*\), only .cls",
    ),
    (lambda root: write_tar(root / "a.tar", [*GOOD, ("a.png", b"x")]), {}, "a.tar: sample a has two members .png"),
    (
        lambda root: write_tar(root / "a.tar", [*GOOD, ("a.jpg", b"x")]),
        {},
        "a.tar: sample a has two images, .png, .cls",
    ),
    (
        lambda root: write_tar(root / "a.tar", [*GOOD, ("b.png", b"x"), ("b.cls", "1"), *GOOD]),
        {},
        "two samples are called a, or its members lie apart",
    ),
    (
        lambda root: write_tar(root / "a.tar", [("a.png", b"x"), ("a.cls", " ")]),
        {},
        "label of sample a, its .cls, is empty",
    ),
    (lambda root: write_tar(root / "a.tar", [("a.png", b"x"), ("a.json", "{")]), {}, "the .json of sample a is none"),
    (
        lambda root: write_tar(root / "a.tar", [("a.png", b"x"), ("a.json", '{"kind": 1}')]),
        {},
        "no whole number or text called fine_label or .*; name another by data.label_column",
    ),
    (
        lambda root: write_tar(root / "a.tar.gz", GOOD, mode="w:gz"),
        {},
        r"a.tar.gz: it is compressed by gzip, so that no image can be read without all before it; uncompress it",
    ),
    (lambda root: write_tar(root / "a.tar", GOOD, mode="w:xz"), {}, "a.tar: .* compressed by xz"),
    (lambda root: write_tar(root / "a.tar", GOOD), {}, "the training images are of 1 class, at least 2 are needed"),
]


@pytest.mark.parametrize(("change", "keys", "message"), BROKEN, ids=[message[:40] for *_, message in BROKEN])
def test_broken_shards(change: Callable[[Path], Any], keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    change(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        data.load(section(tmp_path / "d", **keys), 0)


def test_unreadable_members_are_skipped_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "d/a.tar", [*samples(0, 59), ("z.png", b"no image"), ("z.cls", "cat")])
    dataset = data.load(section(tmp_path / "d", memory_mb=10, validation=0), 0)
    assert [line.split(": ")[0] for line in dataset.corrupt] == [f"{tmp_path}/d/a.tar:z.png"]


# ---- the cache of indices


def test_an_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("tar", tmp_path / "set")
    scans = []
    scan = tar_index._scan
    monkeypatch.setattr(
        tar_index, "_scan", lambda place, *rest: (scans.append(Path(place).name), scan(place, *rest))[1]
    )
    first = sources.find(section(root))
    assert sorted(scans) == [f"train-00{i}.tar" for i in range(4)]
    again = sources.find(section(root))
    assert len(scans) == 4
    assert torch.equal(first.train.labels, again.train.labels)
    assert [first.train.reader.name(i) for i in range(60)] == [again.train.reader.name(i) for i in range(60)]
    write_tar(root / "train-000.tar", samples(0, 16))
    assert len(sources.find(section(root)).train) == 59
    assert len(scans) == 5
    for path in (tmp_path / "cache/tar-index").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert len(sources.find(section(root)).train) == 59
    assert len(scans) == 9
    kept = {path: path.read_bytes() for path in (tmp_path / "cache/tar-index").iterdir()}
    assert not any(b"pickle" in content for content in kept.values())
    monkeypatch.setenv("DDNN_CACHE", "/proc/no/such/place")  # can't be written: done without
    assert len(sources.find(section(root)).train) == 59
    assert len(scans) == 13


# ---- parquet


def test_parquet_is_copied_for_any_order_unless_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("parquet", tmp_path / "set")
    asked: list[str] = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append(a[0]), load(*a, **k))[1])
    epoch(section(root, shuffle="chunks"))
    assert asked == []
    copied = epoch(section(root))
    assert asked == ["parquet"]
    monkeypatch.setattr("ddnn.data.sources.parquet.COPIED", 1000)
    assert same(epoch(section(root)), copied)
    assert asked == ["parquet"]


def test_large_row_groups_from_afar_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make("parquet", tmp_path / "set", rows=25)
    monkeypatch.setattr("ddnn.data.sources.parquet.SMALL", 1000)
    sources.find(section(to_memory(root)))
    assert "are read for each image, as large as its row groups are; set data.shuffle='chunks'" in caplog.text


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_of_other_writers(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa

    content = [c for c, _ in pictures()[:12]]
    column = pa.array([{"bytes": c} for c in content]) if kind == "struct" else pa.array(content, getattr(pa, kind)())
    label = pa.array(["a", "b", "c"] * 4).dictionary_encode()
    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(pa.table({"jpg": column, "label": label}), tmp_path / "d/x.parquet")
    found = sources.find(section(tmp_path / "d", image_column="jpg"))
    assert found.classes == ("a", "b", "c")
    assert [found.train.reader.open(i).tobytes() for i in range(12)] == [
        Image.open(io.BytesIO(c)).tobytes() for c in content
    ]
    with pytest.raises(DataError, match="column 'label' holds no images: it is of type"):
        sources.find(section(tmp_path / "d", image_column="label"))


# ---- other machines


class Server(http.server.SimpleHTTPRequestHandler):
    """A folder by http; in parts, if asked and able to; now and then out of order."""

    ranges = True
    failures = 0

    def do_GET(self) -> None:
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
            return
        given = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not (given and self.ranges and path.is_file()):
            super().do_GET()
            return
        first, _, last = given.removeprefix("bytes=").partition("-")
        content = path.read_bytes()
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: Any) -> None:
        pass


class Patient(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # else it drops some of many connections at once


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, type[Server]]]:
    class Own(Server):
        pass

    (tmp_path / "served").mkdir()
    handler = functools.partial(Own, directory=str(tmp_path / "served"))
    server = Patient(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Own
    server.shutdown()
    thread.join()
    server.server_close()


@forks
@pytest.mark.parametrize(
    ("form", "shuffle"), [("folders", "global"), ("tar", "global"), ("tar", "chunks"), ("parquet", "chunks")]
)
def test_by_http(form: str, shuffle: str, tmp_path: Path, served: tuple[str, type[Server]]) -> None:
    root = make(form, tmp_path / "served/set")
    here, there = section(root, shuffle=shuffle), section(f"{served[0]}/set", shuffle=shuffle, workers=2)
    assert same(epoch(here), epoch(there))
    if form == "tar":
        named = section(f"{served[0]}/set/train-{{000..003}}.tar", shuffle=shuffle)
        assert same(epoch(here), epoch(named))


def test_a_host_that_falters_is_asked_again(tmp_path: Path, served: tuple[str, type[Server]]) -> None:
    given = section(f"{served[0]}/set/train-{{000..003}}.tar", validation=0)
    make("tar", tmp_path / "served/set")
    dataset = data.load(given, 0)
    batches = data.train_batches(dataset, setup(given), epoch=0, device=CPU)
    next(batches)
    served[1].failures = 6
    rest = list(batches)
    assert served[1].failures == 0
    assert len(rest) == len(dataset.train) // 4 - 1
    assert all(len(x) == 4 for x, _ in rest)  # none was given up as unreadable
    assert dataset.corrupt == ()


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_host_that_is_gone_ends_the_training(workers: int, tmp_path: Path, served: tuple[str, type[Server]]) -> None:
    given = section(f"{served[0]}/set/train-{{000..003}}.tar", workers=workers)
    make("tar", tmp_path / "served/set")
    dataset = data.load(given, 0)
    served[1].failures = 10**6
    with pytest.raises(
        DataError, match=r"^data http://.*\.tar: it cannot be read after 4 tries \(.*503.*check the"
    ) as told:
        list(data.train_batches(dataset, setup(given), epoch=0, device=CPU))
    assert "\n" not in str(told.value)


def test_a_server_without_ranges_is_named(tmp_path: Path, served: tuple[str, type[Server]]) -> None:
    make("tar", tmp_path / "served/set")
    served[1].ranges = False
    with pytest.raises(DataError, match=r"does not serve parts of a file \(range requests\)"):
        data.load(section(f"{served[0]}/set/train-{{000..003}}.tar"), 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/set", r"fsspec needs another package for s3:// \(.*s3fs.*\); install it"),
        (
            "nonsense://bucket/set",
            r"data.source='nonsense://bucket/set': Protocol not known.*; allowed are https://, s3://",
        ),
        ("http://127.0.0.1:9/set", r"set: it cannot be read after 4 tries \(.*127.0.0.1:9.*\); check the address"),
        ("http://127.0.0.1:9/a.tar", r"a.tar: it cannot be read"),
        ("memory://nothing/here", r"memory://nothing/here: (it cannot be listed|there are no files, or)"),
        ("memory://nothing/here/a-{0..3}.tar", r"a-0.tar: it cannot be read \(FileNotFoundError"),
        ("memory://nothing/here/a.parquet", r"a.parquet: it cannot be opened \(FileNotFoundError"),
    ],
)
def test_places_that_cannot_be_reached(source: str, message: str) -> None:
    if source.startswith("s3"):
        try:
            import s3fs  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed")
    with pytest.raises(DataError, match=message) as told:
        data.load(section(source), 0)
    assert "\n" not in str(told.value)


def test_remote_class_folders_with_splits(tmp_path: Path) -> None:
    root = make("folders", tmp_path / "set/train").parent
    (root / "val/bee").mkdir(parents=True)
    (root / "val/bee/1.png").write_bytes(pictures()[0][0])
    (root / "readme.txt").write_text("")
    here, there = (sources.find(section(place)) for place in (root, to_memory(root)))
    assert here.classes == there.classes
    for part in ("train", "test"):
        left, right = getattr(here, part), getattr(there, part)
        assert torch.equal(left.labels, right.labels)
        names = [[p.reader.name(i).rpartition("set/")[2] for i in range(len(p))] for p in (left, right)]
        assert names[0] == names[1]


def test_remote_labels_in_a_file(tmp_path: Path) -> None:
    root = make("folders", tmp_path / "set/train").parent
    (root / "val/images").mkdir(parents=True)
    (root / "val/images/1.png").write_bytes(pictures()[0][0])
    (root / "val/val_annotations.txt").write_text("1.png\tbee\n")
    for place in (root, to_memory(root)):
        test = sources.find(section(place)).test
        assert test is not None
        assert test.labels.tolist() == [1]


# ---- many


def test_texts() -> None:
    given = ["a", "", "é", os.fsdecode(b"\xff.png"), "b" * 1000]
    texts = Texts.joined([Texts.of(given[:2]), Texts.of([]), Texts.of(given[2:])])
    assert [texts[i] for i in range(len(texts))] == given
    assert len(Texts.joined([])) == 0


def test_files_are_sorted_as_paths_are(tmp_path: Path) -> None:
    names = ["b/2.png", "b-1.png", "a/z.png", "a.png", "b.png", "B/1.png"]
    for name in ["x/" + name for name in names] + ["y/1.png"]:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"")
    found = sources.find(section(tmp_path / "d"))
    expected = sorted(p for p in (tmp_path / "d/x").rglob("*") if p.is_file())
    assert [found.train.reader.name(i) for i in range(6)] == [str(path) for path in expected]


@pytest.mark.slow
@forks
@pytest.mark.parametrize("form", ["tar", "folders"])
def test_many_images(form: str, tmp_path: Path) -> None:
    """An index of few bytes an image; every image once an epoch over three processes' shares of every batch."""
    content, count = pictures()[0][0], 20_000
    if form == "tar":
        for shard in range(10):
            members: list[tuple[str, bytes | str]] = []
            for i in range(shard * count // 10, (shard + 1) * count // 10):
                members += [(f"{i:07}.cls", str(i % 10)), (f"{i:07}.png", content)]
            write_tar(tmp_path / f"d/{shard}.tar", members)
    else:
        for label in range(10):
            (tmp_path / f"d/{label}").mkdir(parents=True)
            for i in range(count // 10):
                (tmp_path / f"d/{label}/{i:07}.png").write_bytes(content)
    found = sources.find(section(tmp_path / "d"))
    held = [value for value in vars(found.train.reader).values() if isinstance(value, np.ndarray)]
    texts = next(value for value in vars(found.train.reader).values() if isinstance(value, Texts))
    assert sum(array.nbytes for array in (*held, texts.block, texts.starts)) < 48 * count
    given = section(tmp_path / "d", validation=0, test=0.01, workers=2)
    dataset = data.load(given, 0)
    order = epoch_order(dataset.train, setup(given), 0)
    assert order.sort().values.tolist() == list(range(len(dataset.train)))
    seen = epoch(given, start=len(dataset.train) // 4 - 50)
    assert [len(target) for _, target in seen] == [4] * 50
