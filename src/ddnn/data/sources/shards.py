"""Files that hold many images each: which there are, and of which split."""

import os
import re
from collections.abc import Sequence

from ddnn.data.sources import places
from ddnn.data.sources.found import SPLITS

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Names of tar files; all but the first are compressed, which ends in an error that says so."""


def split_of(path: str) -> str:
    """Of which split a file is, by the words of its name, then of its folders, the nearest first; else `train`."""
    for part in reversed(path.split("/")):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for split, known in SPLITS.items():
            if any(word in known for word in words):
                return split
    return "train"


def local(root: str) -> list[str]:
    """Paths of the parquet files and archives in a folder and in the folders in it, sorted."""
    found = []
    for folder in ("", *sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))):
        if folder in ("", "data") or folder.lower() in {word for words in SPLITS.values() for word in words}:
            names = (e.name for e in os.scandir(os.path.join(root, folder)) if not e.name.startswith("."))
            found += [
                f"{folder}/{name}" if folder else name for name in names if name.endswith((".parquet", *ARCHIVES))
            ]
    return sorted(found)


def by_split(root: str, paths: Sequence[str]) -> dict[str, list[str]]:
    """Places of the files at `paths` within `root`, by split, in order; the training's first."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(paths):
        found[split_of(path)].append(f"{root}/{path}" if root else path)
    return {split: files for split, files in found.items() if files}


def named(source: str) -> list[str]:
    """The files that a `data.source` names itself, with braces or without; none where it is a folder."""
    files = places.expanded(source)
    return files if all(file.endswith((".parquet", *ARCHIVES)) for file in files) else []
