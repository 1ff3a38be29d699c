"""A copy of a bundle laid out for one machine, whose depths share their weights in memory.

By default onnxruntime folds the batch norms into the weights of each graph and lays these out for the processor, so
that every depth has weights of its own in memory. Here the graphs are laid out once, batch norms left as they are: then
weights that are the same stay the same. They are written to one file, every tensor once, and all sessions of all
processes map that file into memory. Such graphs run on the kind of machine they were made on and no other.

The copy of a bundle is called by its digest, so that one of a newer bundle does not take the place of one in use.
Copies of other bundles that nobody has loaded are removed when a new one is made.

    shared.json     which tensor of which graph is where in the file; checksums
    shared.bin      the tensors
    NAME.onnx       the graphs, without them
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from ddnn.errors import BundleError, ExportError, first_line
from ddnn.files import fingerprint, hold, new_folder, remove_unused
from ddnn.runtime.kept import text_of
from ddnn.runtime.machine import give_back
from ddnn.runtime.manifest import Checked, File, Manifest, check_file
from ddnn.runtime.sessions import options

if TYPE_CHECKING:
    from ddnn.runtime.graphs import External

PREFIX, INDEX, WEIGHTS = "shared-", "shared.json", "shared.bin"
_SMALL = 256
"""Bytes up to which a tensor stays in its graph."""
_PAGE = 4096
_ONE_AT_A_TIME = threading.Lock()
"""Within this process; others that make the same copy at the same time find out when it takes its place."""


class Shared:
    """The copy in a folder; `open` makes it where there is none yet."""

    def __init__(self, folder: Path, index: Mapping[str, Any], checked: Checked) -> None:
        self.folder = folder
        self.checked = checked
        """The files of the copy."""
        self._index = index
        self._bytes: npt.NDArray[np.uint8] = np.memmap(folder / WEIGHTS, dtype=np.uint8, mode="r").view(np.ndarray)
        checked.unchanged()

    @classmethod
    def open(cls, manifest: Manifest, originals: Checked, machine: Path) -> "Shared":
        """The copy of this bundle in the folder of this machine, made anew where it is damaged.

        Raises `BundleError` where it can't be made, or the `originals` have changed since they were checked.
        """
        folder = machine / f"{PREFIX}{manifest.digest[:12]}"
        with _ONE_AT_A_TIME:
            found = cls._held(manifest, folder)
            if found is None:
                _make(manifest, originals, folder)
                found = cls._held(manifest, folder)
        if found is None:
            raise BundleError(f"the shared copy {folder} is damaged as soon as it is written; load without shared")
        return found

    @classmethod
    def _held(cls, manifest: Manifest, folder: Path) -> "Shared | None":
        """The copy, kept from being removed for as long as anything refers to it; None where there is none."""
        try:
            handle = hold(folder, alone=False) if folder.is_dir() else None
        except OSError as error:
            raise BundleError(
                f"the shared copy {folder} can't be opened: {error.strerror}; load without shared"
            ) from None
        if handle is None:
            return None
        found = _read(manifest, folder)
        if found is None:
            os.close(handle)
            return None
        copy = cls(folder, *found)
        weakref.finalize(copy, os.close, handle)
        return copy

    def locate(self, graph: str) -> tuple[Path, dict[str, npt.NDArray[np.generic]]]:
        """The file of a graph and its tensors, views of the one memory map."""
        tensors = {
            name: self._bytes[at : at + length].view(kind).reshape(shape)
            for name, (at, length, kind, shape) in self._index["graphs"][graph].items()
        }
        return self.folder / graph, tensors


def _read(manifest: Manifest, folder: Path) -> tuple[dict[str, Any], Checked] | None:
    """The index and its files; None where there is no copy of this bundle, or a damaged one."""
    try:
        index: dict[str, Any] = json.loads(text_of(folder / INDEX))
        checksum = index.pop("sha256")
        if checksum != _checksum(index) or index["bundle"] != manifest.digest:
            return None
        stamps = {folder / name: check_file(folder / name, File(**about)) for name, about in index["files"].items()}
    # a `BundleError` is a `ValueError`
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    return index, Checked(manifest.folder, stamps)


def _checksum(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _make(manifest: Manifest, originals: Checked, folder: Path) -> None:
    """Lay out all graphs; the folder is there whole or not at all."""
    graphs = [net.graph for net in manifest.nets.values()]
    graphs += [net.cascade.graph for net in manifest.nets.values() if net.cascade]
    try:
        while folder.exists():
            if _read(manifest, folder) is not None:  # another process was quicker
                return
            try:
                shutil.rmtree(folder)  # damaged
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # another process removes, or replaces it, too
                    raise
        for other in folder.parent.glob(f"{PREFIX}*"):
            remove_unused(other)
        with new_folder(folder) as beside:
            _fill(manifest, graphs, beside)
            originals.unchanged()
    except ExportError as error:
        if _read(manifest, folder) is None:  # see above
            raise BundleError(f"the shared copy can't be made: {error}; load without shared") from None
    except OSError as error:
        raise BundleError(f"the shared copy can't be made: cannot remove {folder}: {error.strerror}") from None
    finally:
        give_back()


def _fill(manifest: Manifest, graphs: list[str], folder: Path) -> None:
    from ddnn.runtime.graphs import externals  # protobuf takes a while to load

    index: dict[str, Any] = {"bundle": manifest.digest, "graphs": {}}
    places: dict[bytes, int] = {}
    with (folder / WEIGHTS).open("wb") as weights:
        for graph in graphs:
            apart = folder / "apart"
            apart.mkdir()
            _lay_out(manifest.folder / graph, apart / graph)
            index["graphs"][graph] = {
                tensor.name: (_place(tensor, apart, weights, places), tensor.length, tensor.kind, tensor.shape)
                for tensor in externals((apart / graph).read_bytes())
            }
            (apart / graph).replace(folder / graph)
            shutil.rmtree(apart)
    index["files"] = {name: fingerprint(folder / name) for name in [WEIGHTS, *graphs]}
    checksum = _checksum(json.loads(json.dumps(index)))  # as it will be read: no tuples
    (folder / INDEX).write_text(json.dumps({**index, "sha256": checksum}), encoding="utf-8")


def _lay_out(graph: Path, out: Path) -> None:
    """Let onnxruntime write a graph as it would run it, but for the folding of batch norms.

    Its tensors go to a file beside it. That bears the name of the file that all graphs will share, since onnxruntime
    wants the file a graph names to be there, though it takes the tensors from memory.
    """
    chosen = options(threads=1)
    chosen.optimized_model_filepath = str(out)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(_SMALL))
    try:
        onnxruntime.InferenceSession(
            str(graph), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=["ConvBNFusion"]
        )
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise BundleError(
            f"the shared copy can't be made: onnxruntime {onnxruntime.__version__} cannot lay out {graph} on its disk, "
            f"which may be full ({first_line(error, kind=False)}); load without shared"
        ) from None


def _place(tensor: "External", folder: Path, weights: Any, places: dict[bytes, int]) -> int:
    """Where a tensor is in the weights file; it is added if its like is not there yet."""
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        content = file.read(tensor.length)
    key = hashlib.sha256(content).digest()
    if key not in places:
        alignment = _PAGE if len(content) >= _PAGE else 64
        weights.write(bytes(-weights.tell() % alignment))
        places[key] = weights.tell()
        weights.write(content)
    return places[key]
