"""What it costs to train on many images: start-up, memory, images per second, from ten thousand to over a million.

    python benchmarks/data.py --out runs/data                         # makes what it reads: 20 GB, ten minutes, once
    python benchmarks/data.py --out runs/data --images 10000 --formats tar,parquet --json
    python benchmarks/data.py --out runs/data --from photos/          # of other images, by any data.source
    python benchmarks/data.py --out runs/data --rivals                # webdataset and datasets on the same files

The training images of `--from` are taken as they are stored, or, where they were stored as arrays, as PNG, and repeated
up to the number wanted, in as many classes as ImageNet has. Each form at each size is measured in a process of its own.

startup             seconds of `data.load`: index, splits, mean and standard deviation
startup_again       the same in the next process, which finds the index of tar shards kept
find, statistics    the parts of that: to find the images and their labels; mean and standard deviation
first_batch         seconds to the first batch of an epoch: its order, and the start of the workers
main, worker        memory of the main process and of one worker after some batches, MiB: a share of what they share,
                    and no pages of files, such as libraries
index               what the main process holds for the images, MiB: arrays of the reader, labels, order
images              images per second through `train_batches` with two workers, random crop and flip
disk                images per second that are only read, in the same order, by two processes
decoder             images per second that are only decoded, from memory, by two processes
augmented           the same, and cropped and flipped as in training
of_decoder          `images` over what disk and decoder one after the other give
of_all              `images` over what disk and `augmented` one after the other give: 1 is nothing lost
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from ddnn import data
from ddnn.data import decode, sources
from ddnn.data.augment import for_training, global_stream
from ddnn.data.order import epoch_order
from ddnn.data.sets import DataSet, Stored
from ddnn.device import keep_freed_memory
from ddnn.files import write_atomic
from ddnn.picture import rgb
from ddnn.recipe import Data, Recipe, parse

FORMATS = ("folders", "parquet", "tar")
CLASSES = 1000
SHARD = 10_000
ROW_GROUP = 100
"""Rows of a row group, as the Hugging Face library writes images."""
DISTINCT = 50_000
WORKERS = 2
COLUMNS = ("startup", "startup_again", "find", "statistics", "first_batch", "main", "worker", "index", "images", "disk")
COLUMNS = (*COLUMNS, "decoder", "augmented", "of_decoder", "of_all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the images are made, and found the next time")
    parser.add_argument("--images", default="10000,100000,1280000", help="numbers of images")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of folders, parquet, tar")
    parser.add_argument("--shuffle", default="global", help="data.shuffle")
    parser.add_argument("--from", dest="source", default="cifar100", help="data.source of the images that are repeated")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring images per second, each")
    parser.add_argument("--rivals", action="store_true", help="images per second of other libraries instead")
    parser.add_argument("--only-make", action="store_true", help="make the files, measure nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.shuffle, arguments.seconds, arguments.first)))
        return
    made = {
        (form, int(count)): make(form, int(count), arguments.source, arguments.out)
        for count in arguments.images.split(",")
        for form in arguments.formats.split(",")
    }
    if arguments.only_make:
        return
    os.environ["DDNN_CACHE"] = str(arguments.out / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(arguments.out / "cache/datasets")
    if arguments.rivals:
        results: dict[str, Any] = {
            f"{form} {n}": rivals(form, place, arguments.seconds) for (form, n), place in made.items()
        }
    else:
        results = {f"{form} {n}": in_process(place, arguments) for (form, n), place in made.items()}
    results = {"machine": machine(), "shuffle": arguments.shuffle, "sets": results}
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        Console(width=160).print(table(results["sets"]))


def machine() -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}


# ---- making


def make(form: str, count: int, source: str, out: Path) -> Path:
    """A data set of `count` images in one form; what is there already is taken."""
    place = out / f"{form}-{count}"
    if not (place / ".made").exists():
        print(f"making {place}", file=sys.stderr)
        place.mkdir(parents=True, exist_ok=True)
        pictures = encoded(source, out)
        {"folders": make_folders, "parquet": make_parquet, "tar": make_tar}[form](place, count, pictures)
        write_atomic(place / ".made", b"")
    return place


def encoded(source: str, out: Path) -> list[tuple[bytes, int]]:
    """The images that are repeated, as JPEG, and their labels."""
    kept = out / "pictures.npz"
    if not kept.exists():
        found = sources.find(Data(source=source)).train
        which = torch.linspace(0, len(found) - 1, min(DISTINCT, len(found)), dtype=torch.float64).long()
        jpegs = []
        for number in found.index[which].tolist():
            content = io.BytesIO()
            decode.rgb(found.reader, number).save(content, "JPEG", quality=90)
            jpegs.append(np.frombuffer(content.getvalue(), np.uint8))
        out.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(jpeg) for jpeg in jpegs])
        np.savez(kept, block=np.concatenate(jpegs), ends=ends, labels=found.labels[which].numpy())
    with np.load(kept) as held:
        block, ends, labels = held["block"], held["ends"].tolist(), held["labels"].tolist()
    starts = [0, *ends[:-1]]
    return [(block[a:b].tobytes(), label) for a, b, label in zip(starts, ends, labels, strict=True)]


def numbered(pictures: Sequence[tuple[bytes, int]], first: int, last: int) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and class of images; what is repeated goes into other classes."""
    for i in range(first, last):
        content, label = pictures[i % len(pictures)]
        yield i, content, (label * 10 + i // len(pictures) % 10) % CLASSES


def make_folders(place: Path, count: int, pictures: Sequence[tuple[bytes, int]]) -> None:
    there: set[int] = set()
    for i, content, label in numbered(pictures, 0, count):
        folder = f"{place}/n{label:04}"
        if label not in there:
            os.makedirs(folder, exist_ok=True)
            there.add(label)
        with open(f"{folder}/{i:07}.jpg", "wb") as file:
            file.write(content)


def make_tar(place: Path, count: int, pictures: Sequence[tuple[bytes, int]]) -> None:
    for shard in range(-(-count // SHARD)):
        with tarfile.open(place / f"train-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for i, content, label in numbered(pictures, shard * SHARD, min(count, (shard + 1) * SHARD)):
                for name, member in ((f"{i:07}.cls", str(label).encode()), (f"{i:07}.jpg", content)):
                    about = tarfile.TarInfo(name)
                    about.size = len(member)
                    archive.addfile(about, io.BytesIO(member))


def make_parquet(place: Path, count: int, pictures: Sequence[tuple[bytes, int]]) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"n{label:04}" for label in range(CLASSES)]
    schema = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names)).arrow_schema
    shards = -(-count // SHARD)
    for shard in range(shards):
        rows = list(numbered(pictures, shard * SHARD, min(count, (shard + 1) * SHARD)))
        columns = {
            "image": [{"bytes": content, "path": f"{i:07}.jpg"} for i, content, _ in rows],
            "label": [label for *_, label in rows],
        }
        path = place / f"train-{shard:05}-of-{shards:05}.parquet"
        pq.write_table(pa.table(columns, schema=schema), path, row_group_size=ROW_GROUP)


# ---- measuring


def in_process(place: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--out", str(arguments.out), "--shuffle", arguments.shuffle]
    command += ["--seconds", str(arguments.seconds), "--one"]
    shutil.rmtree(arguments.out / "cache", ignore_errors=True)
    first, again = (
        json.loads(subprocess.run([*command, str(place), *more], capture_output=True, text=True, check=True).stdout)
        for more in (["--first"], [])
    )
    # What is read twice is in memory the second time, as in every epoch but the first where there is room.
    return {**again, "startup": first["startup"], "find": first["find"], "startup_again": again["startup"]}


def measure(place: str, shuffle: str, seconds: float, first: bool) -> dict[str, float]:
    """All figures of one data set, in this process; with `first` those of starting up."""
    import datasets  # noqa: F401  # its import is no part of the start-up

    given = Data(
        source=place,
        memory_mb=0,
        workers=WORKERS,
        test=0.01,
        validation=0,
        image_size=32,
        shuffle=shuffle,  # type: ignore[arg-type]
    )
    recipe = parse({"data": given.model_dump(exclude_none=True), "train": {"batch_size": 128}})
    spent: dict[str, float] = {}
    clocked(sources, "find", spent, "find")
    clocked(data.sets, "_measured", spent, "statistics")
    begin = time.perf_counter()
    dataset = data.load(given, 0)
    result = {"startup": time.perf_counter() - begin, **spent}

    if first:
        return result
    keep_freed_memory()  # as a training does
    begin = time.perf_counter()
    batches = data.train_batches(dataset, recipe, epoch=0, device=torch.device("cpu"))
    next(batches)
    result["first_batch"] = time.perf_counter() - begin
    for _ in range(20):  # some were made in advance while nobody asked
        next(batches)
    workers = [process.pid for process in multiprocessing.active_children()]
    result["main"] = resident("self")
    result["worker"] = sum(resident(str(each)) for each in workers) / len(workers)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds and (batch := next(batches, None)) is not None:
        count += len(batch[1])
    result["images"] = count / (time.perf_counter() - begin)
    result["index"] = held(dataset, recipe) / 2**20
    batches.close()
    return {**result, **ceilings(dataset, recipe, seconds / 2, result["images"])}


def clocked(module: Any, name: str, spent: dict[str, float], what: str) -> None:
    function = getattr(module, name)

    def timed(*given: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*given, **more)
        finally:
            spent[what] = time.perf_counter() - begin

    setattr(module, name, timed)


def resident(process: str) -> float:
    """Memory of its own and its share of that shared with workers, MiB, without files such as libraries."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


def held(dataset: DataSet, recipe: Recipe) -> int:
    """Bytes of all arrays that go with the number of images."""
    assert isinstance(dataset.train, Stored)
    seen, total = set(), 0
    order = epoch_order(dataset.train, recipe, 0)
    todo: list[Any] = [dataset.train, dataset.test, order]
    while todo:
        value = todo.pop()
        if id(value) in seen or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray | torch.Tensor):
            total += value.nbytes
        elif type(value).__module__.startswith("ddnn"):
            todo += vars(value).values()
    return total


def ceilings(dataset: DataSet, recipe: Recipe, seconds: float, images: float) -> dict[str, float]:
    """What the disk and the decoder give by themselves, in another epoch's order, so that nothing is at hand."""
    assert isinstance(dataset.train, Stored)
    reader = dataset.train.files.reader
    order = dataset.train.files.index[epoch_order(dataset.train, recipe, 1)].tolist()
    jpegs = [content_of(reader, number) for number in order[:2000]]
    disk = by_two(lambda part: content_of(reader, part), order[2000:], seconds)
    decoder = by_two(lambda jpeg: Image.open(io.BytesIO(jpeg)).convert("RGB"), jpegs * 1000, seconds)
    change = for_training(recipe.augment, dataset.image_size)

    def changed(jpeg: bytes) -> None:
        with global_stream("benchmark", len(jpeg)):
            change(rgb(lambda: Image.open(io.BytesIO(jpeg))))

    augmented = by_two(changed, jpegs * 1000, seconds)
    return {
        "disk": disk,
        "decoder": decoder,
        "augmented": augmented,
        "of_decoder": images * (1 / disk + 1 / decoder),
        "of_all": images * (1 / disk + 1 / augmented),
    }


def content_of(reader: Any, number: int) -> bytes:
    """An image as it is stored, by the way that is shortest for its form, without this project's code."""
    name = reader.name(number) if hasattr(reader, "paths") else ""
    if name:
        with open(name, "rb") as file:
            return file.read()
    if hasattr(reader, "shards"):
        with open(reader.shards[np.searchsorted(reader.first, number, side="right") - 1], "rb") as file:
            return os.pread(file.fileno(), int(reader.sizes[number]), int(reader.starts[number]))
    if hasattr(reader, "rows"):
        return reader.rows[number][reader.column]["bytes"]
    import pyarrow.parquet as pq

    group = int(np.searchsorted(reader.starts, number, side="right")) - 1
    which = int(np.searchsorted(reader.first, group, side="right")) - 1
    file = reader.files[which]
    with pq.ParquetFile(file.place, metadata=file.metadata, memory_map=True) as opened:
        rows = opened.read_row_group(group - int(reader.first[which]), columns=["image.bytes"], use_threads=False)
    return rows["image"].chunk(0).field("bytes")[number - int(reader.starts[group])].as_py()


def by_two(action: Callable[[Any], Any], items: Sequence[Any], seconds: float) -> float:
    """Items per second by as many processes as there are workers."""

    def work(part: Sequence[Any], told: Any) -> None:
        begin = time.perf_counter()
        for count, item in enumerate(part, 1):
            action(item)
            if count % 50 == 0 and time.perf_counter() - begin > seconds:
                break
        told.put(count / (time.perf_counter() - begin))

    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=work, args=(items[i::WORKERS], told)) for i in range(WORKERS)]
    for process in processes:
        process.start()
    rates = [told.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


# ---- rivals


class Decoded(Dataset[tuple[np.ndarray, int]]):
    def __init__(self, images: sources.Labelled) -> None:
        self._images = images

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        picture = decode.rgb(self._images.reader, int(self._images.index[place]))
        return np.asarray(picture), int(self._images.labels[place])

    def __len__(self) -> int:
        return len(self._images)


def rivals(form: str, place: Path, seconds: float) -> dict[str, float]:
    """Images per second of others on the same files, decoded by Pillow and no more, with two workers; ours likewise."""
    from torch.utils.data import DataLoader, default_collate

    result: dict[str, float] = {}
    for shuffle in ("global", "chunks")[: 1 if form == "folders" else 2]:
        given = parse({"data": {"source": str(place), "shuffle": shuffle}})
        found = sources.find(given.data).train
        chunk = data.sets._chunk(found) if shuffle == "chunks" else None
        order = epoch_order(data.Images(found.labels, chunk=chunk), given, 0)
        loader = DataLoader(Decoded(found), batch_size=128, sampler=order.tolist(), num_workers=WORKERS)
        result[f"ddnn, {shuffle}"] = rate(loader, seconds)
    if form == "tar":
        import webdataset

        shards = sorted(map(str, place.glob("*.tar")))
        stream = webdataset.WebDataset(shards, shardshuffle=100, seed=0).shuffle(5000)
        stream = (
            stream.decode("pil").to_tuple("jpg", "cls").map(lambda pair: (np.asarray(pair[0]), pair[1])).batched(128)
        )
        loader = DataLoader(stream, batch_size=None, num_workers=WORKERS)
        result["webdataset, stream with a buffer of 5000"] = rate(loader, seconds)
    if form == "parquet":
        import datasets

        datasets.disable_progress_bars()
        begin = time.perf_counter()
        rows = datasets.load_dataset("parquet", data_files=str(place / "*.parquet"), cache_dir=str(place.parent / "hf"))
        result["datasets, copying, seconds"] = time.perf_counter() - begin
        table = rows["train"].with_transform(
            lambda batch: {
                "image": [np.asarray(each.convert("RGB")) for each in batch["image"]],
                "label": batch["label"],
            }
        )
        loader = DataLoader(table, batch_size=128, shuffle=True, num_workers=WORKERS, collate_fn=default_collate)
        result["datasets, the copy, in any order"] = rate(loader, seconds)
        stream = datasets.load_dataset("parquet", data_files=str(place / "*.parquet"), streaming=True)["train"]
        stream = stream.shuffle(seed=0, buffer_size=5000).map(lambda row: {"image": np.asarray(row["image"])})
        loader = DataLoader(stream, batch_size=128, num_workers=WORKERS, collate_fn=default_collate)
        result["datasets, stream with a buffer of 5000"] = rate(loader, seconds)
    return result


def rate(loader: Any, seconds: float) -> float:
    batches = iter(loader)
    for _ in range(2 * WORKERS + 1):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds and next(batches, None) is not None:
        count += 128
    return count / (time.perf_counter() - begin)


def table(results: dict[str, dict[str, float]]) -> Table:
    columns = [c for c in COLUMNS if any(c in row for row in results.values())]
    columns += sorted({c for row in results.values() for c in row} - set(COLUMNS))
    out = Table()
    for column in ("set", *columns):
        out.add_column(column, justify="left" if column == "set" else "right")
    for name, row in results.items():
        out.add_row(
            name, *("" if c not in row else f"{row[c]:.2f}" if row[c] < 100 else f"{row[c]:.0f}" for c in columns)
        )
    return out


if __name__ == "__main__":
    main()
