"""The run folder: what a training leaves behind, written so that a kill at any moment loses nothing already there.

    recipe.toml          the resolved recipe
    run.json             versions, machine, seed, data (classes, image size, normalisation); `resumed`, where and with
                         what the run went on, if that was another
    metrics.jsonl        one line per epoch
    tensorboard/         the same as events
    checkpoints/         step-NUMBER-DIGEST.pt, the last two; DIGEST begins the file's sha256
    model.safetensors    weights of all nets, each stored once; written at the end
    summary.json         the table of sub-nets; written last, so a run that has it is complete

Every file is written beside its place, flushed to the disk and then renamed. Nothing is unpickled: checkpoints are
read with `weights_only`, weights with safetensors.
"""

import contextlib
import hashlib
import io
import json
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ddnn import recipe as recipes
from ddnn.device import settled
from ddnn.errors import RunError
from ddnn.files import held_alone, write_atomic
from ddnn.network import DDNN
from ddnn.recipe import Recipe
from ddnn.wording import resuming

KEEP = 2  # checkpoints: the newest, and one before it should that prove damaged

LINGER_S = 10.0  # processes that decode images outlive a killed training by some seconds, and hold what it held

log = logging.getLogger("ddnn")


class RunFolder:
    """One run's folder; `create` makes a new one, `open` takes an existing one."""

    def __init__(self, path: Path, recipe: Recipe, *, written: bool = True) -> None:
        self.path = path
        self.recipe = recipe
        self._written = written

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """A new run folder; `RunError` if something is there already, but for the recipe of a run that never began."""
        taken = not path.is_dir() if path.exists() else False
        if taken or (path.is_dir() and any(f.name != "recipe.toml" for f in path.iterdir())):
            resume = f", or go on with --resume {path}" if (path / "recipe.toml").is_file() else ""
            raise RunError(f"{path} exists already; give another --out{resume}")
        recipe = settled(recipe)
        with _alone(path, wait_s=0.0) if path.is_dir() else contextlib.nullcontext():
            write_atomic(path / "recipe.toml", recipe.to_toml().encode())
        return cls(path, recipe)

    @classmethod
    def create_or_open(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """A new run folder, or that of a run of the same recipe, to go on with; `RunError` for anything else."""
        if not (path / "recipe.toml").is_file():
            return cls.create(path, recipe)
        run = cls.open(path)
        if run.recipe != settled(recipe, run.recipe):
            raise RunError(f"{path} holds a run of another recipe; give another --out, or the recipe it has")
        return run

    def remove_unbegun(self) -> None:
        """Remove the folder of a run that never began: it holds its recipe and nothing else."""
        with contextlib.suppress(OSError):
            if [file.name for file in self.path.iterdir()] == ["recipe.toml"]:
                (self.path / "recipe.toml").unlink()
                self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run in this folder; `RunError` if it holds none."""
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} is no run folder: it has no recipe.toml")
        if (path / "comparison.json").exists() and not (path / "run.json").exists():
            raise RunError(f"{path} is a comparison and no run; its runs are the folders in {path / 'runs'}")
        return cls(path, recipes.reopen(path / "recipe.toml"))

    def held(self) -> AbstractContextManager[None]:
        """Keep other trainings out of this folder; `RunError` if one is in it already.

        The lock is one of the system's on the folder: a kill lifts it, and no file is left. Where a file system or an
        operating system knows none, nothing is kept out.
        """
        return _alone(self.path, LINGER_S)

    def sweep(self) -> None:
        """Remove what a kill in the middle of a write has left; only for a training that takes the run over."""
        for torn in [*self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*.tmp")]:
            with contextlib.suppress(OSError):
                torn.unlink()

    def unwritten(self) -> "RunFolder":
        """The same run for a process that must not write: whatever it is asked to write is dropped."""
        return RunFolder(self.path, self.recipe, written=False)

    def _write(self, name: str, content: bytes) -> None:
        if self._written:
            write_atomic(self.path / name, content)

    # -- small files --------------------------------------------------------------------------------------------

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `run.json` or `summary.json`."""
        self._write(name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content, or None where the file is not there yet."""
        path = self.path / name
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is damaged and cannot be read: {error}") from None
        return content

    def finished(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `run.json` and `summary.json` say; `RunError` for a run that has not ended."""
        about, summary = self.read_json("run.json"), self.read_json("summary.json")
        if about is None or summary is None:
            raise RunError(f"the run in {self.path} is not finished; go on with: {resuming(self.path)}")
        return about, summary

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        return epochs_of(self.path)

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        """Write all epochs so far."""
        self._write("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs).encode())

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Keep the state after `step` optimiser steps, then drop the oldest checkpoints."""
        if not self._written:
            return
        buffer = io.BytesIO()
        torch.save({"recipe": self._digest_as_written(), **state}, buffer)
        content = buffer.getvalue()
        name = f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        self._write(f"checkpoints/{name}", content)
        for old in self._checkpoints()[KEEP:]:
            old.unlink(missing_ok=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest good state, or None for a run that was stopped before its first.

        A damaged checkpoint is named in the log and passed over; if there is none but damaged ones, `RunError`.
        """
        found = self._checkpoints()
        for path in found:
            try:
                content = path.read_bytes()
            except OSError as error:
                log.warning("checkpoint %s cannot be read (%s); trying the one before it", path, error.strerror)
                continue
            if hashlib.sha256(content).hexdigest()[:16] != path.stem.rpartition("-")[2]:
                log.warning("checkpoint %s is damaged (its checksum differs); trying the one before it", path)
                continue
            try:
                state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise RunError(f"{path} holds more than a checkpoint does and is not loaded") from None
            if state.pop("recipe") != self._digest_as_written():
                raise RunError(f"checkpoint {path} belongs to another recipe than {self.path / 'recipe.toml'}")
            return state
        if found:
            names = ", ".join(path.name for path in found)
            raise RunError(f"every checkpoint in {found[0].parent} is damaged ({names}); the run can't be resumed")
        return None

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        pattern = re.compile(r"step-\d+-[0-9a-f]{16}\.pt")
        folder = self.path / "checkpoints"
        files = folder.iterdir() if folder.is_dir() else []
        return sorted((f for f in files if pattern.fullmatch(f.name)), key=lambda f: f.name, reverse=True)

    def recipe_digest(self) -> str:
        """Hex SHA-256 of the resolved recipe, in whatever order it names things."""
        content = json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _digest_as_written(self) -> str:
        """Hex SHA-256 of `recipe.toml` as the run began with it: it lacks settings that later versions brought."""
        return hashlib.sha256((self.path / "recipe.toml").read_bytes()).hexdigest()

    # -- weights ------------------------------------------------------------------------------------------------

    def save_weights(self, net: DDNN) -> str:
        """Write `model.safetensors`, every tensor once, and return its sha256."""
        content = weights_of(net)
        self._write("model.safetensors", content)
        return hashlib.sha256(content).hexdigest()

    def load_weights(self, net: DDNN, digest: str) -> None:
        """Fill a freshly built net; `RunError` for a file that is not the one the run wrote."""
        fill(net, self.path / "model.safetensors", digest, stated="summary.json", source=self.path / "recipe.toml")


def epochs_of(run: Path) -> list[dict[str, Any]]:
    """The epochs so far of the run in a folder. A last line torn by a kill is left out."""
    path = run / "metrics.jsonl"
    epochs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            epochs.append(json.loads(line))
        except ValueError:
            break
    return epochs


@contextlib.contextmanager
def _alone(path: Path, wait_s: float) -> Iterator[None]:
    with held_alone(path, wait_s) as held:
        if not held:
            raise RunError(f"another training is writing to {path}; let it end, or stop it first")
        yield


def weights_of(net: DDNN) -> bytes:
    """A DDNN's state as a safetensors file, every tensor once."""
    return save_safetensors({k: t.contiguous() for k, t in net.state_dict().items()}, {"format": "pt"})


def fill(net: DDNN, path: Path, digest: str, *, stated: str, source: Path) -> None:
    """Fill a freshly built net from a file that `weights_of` wrote; `RunError` for any other file.

    `digest` is the file's sha256, `stated` where that is written down, `source` what the net was built from.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise RunError(f"{path} is damaged or was replaced: its checksum is not the one in {stated}")
    try:
        weights = load_safetensors(content)
    except SafetensorError as error:
        raise RunError(f"{path} is no safetensors file: {error}") from None
    ours = net.state_dict()
    if weights.keys() != ours.keys() or any(weights[k].shape != ours[k].shape for k in ours):
        raise RunError(f"{path} holds other tensors than the network of {source}")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(weights[name])
