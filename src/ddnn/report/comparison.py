"""What `ddnn compare` leaves behind: `comparison.json`, and the epochs of its runs."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddnn.checkpoint import RunFolder
from ddnn.errors import DDNNError, RunError, first_mistake

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]

LABELS = {
    "ekd": "DDNN-EKD",
    "alone": "alone",
    "joint": "joint (cross-entropy only)",
    "kl": "KL only",
    "attention": "attention only",
    "two-model-kd": "two-model KD",
    "ekd-pretrained": "frozen-teacher EKD",
    "adaptive-depth": "adaptive-depth objective",
}
"""The methods every comparison may have, in the order to show them, and what people call them."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Net(_Part):
    """A sub-net, or the full-net."""

    depths: list[int]
    params: Amount
    macs: Amount
    latency_ms: Amount


class Method(_Part):
    """One way of training all nets."""

    subnets: dict[str, list[Share | None]]
    """Top-1 accuracy of each net, one per seed; None where the run is not finished."""
    seconds: Amount | None
    cpu_seconds: Amount | None = None
    macs_per_step: Amount | None
    peak_memory_mb: Amount | None
    runs: dict[str, list[str]]
    """Of each seed, the run folders."""


class Comparison(_Part):
    """The content of `comparison.json`; what only a finished run can tell may be missing."""

    dataset: str
    recipe: str
    seeds: Annotated[list[int], Field(min_length=1)]
    nets: dict[str, Net]
    methods: dict[str, Method]
    epochs: int | None = None
    """Of a training of all nets together."""
    full_net_epochs: int = 0
    """Of these, how many were the full-net's alone."""
    alone_epochs: int | None = None
    """Of a training of one net."""
    machine: str | None = None
    """All of them as one text."""
    machines: list[str] = []
    versions: dict[str, str] = {}
    """By package; several by commas."""
    test_images: int | None = None
    commit: str | None = None

    @model_validator(mode="after")
    def _one_accuracy_per_seed(self) -> Self:
        for method, content in self.methods.items():
            for net, scores in content.subnets.items():
                if len(scores) != len(self.seeds):
                    raise ValueError(f"{method} has {len(scores)} accuracies of {net} for {len(self.seeds)} seeds")
        return self

    @property
    def net_names(self) -> list[str]:
        """All nets, the full-net last. Before every net was measured once, only the methods name them all."""
        listings = [list(self.nets), *(list(method.subnets) for method in self.methods.values())]
        return list(dict.fromkeys(name for names in sorted(listings, key=len, reverse=True) for name in names))

    @property
    def method_names(self) -> list[str]:
        """All methods in the order to show them: the known ones, then options beyond them."""
        known = [name for name in LABELS if name in self.methods]
        return known + [name for name in self.methods if name not in LABELS]

    def top1(self, method: str, net: str) -> dict[int, float]:
        """Accuracy by seed, of the seeds that are finished."""
        found = self.methods[method].subnets.get(net, []) if method in self.methods else []
        return {seed: top1 for seed, top1 in zip(self.seeds, found, strict=False) if top1 is not None}


def parse(content: Any, where: str = "the comparison") -> Comparison:
    """Check the content of `comparison.json`; `RunError` names the first thing wrong with it."""
    try:
        comparison = Comparison.model_validate(content)
    except ValidationError as error:
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RunError(f"{where} cannot be used: {first_mistake(error.errors())}{more}") from None
    if not comparison.methods:
        raise RunError(f"{where} has no methods, so there is nothing to compare")
    return comparison


def read(folder: Path) -> Comparison:
    """The comparison in a folder; `RunError` if there is none or it is damaged."""
    path = folder / "comparison.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder} is no comparison: it has no comparison.json") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged and cannot be read: {error}") from None
    return parse(content, str(path))


@dataclass(frozen=True)
class Curves:
    """Top-1 accuracy by epoch, mean over seeds, of each (method, net); NaN while a sub-net had not joined yet."""

    train: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    validation: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    """Run folders that are not there or cannot be read."""


def read_curves(folder: Path, comparison: Comparison) -> Curves:
    """The training curves of a comparison's runs."""
    curves = Curves()
    for name, method in comparison.methods.items():
        epochs = {seed: _epochs(folder, method.runs.get(str(seed), []), curves) for seed in comparison.seeds}
        for net in comparison.net_names:
            # Seeds still in training would cut the mean short; they count only where none is finished.
            seeds = comparison.top1(name, net) or comparison.seeds
            train = [_of(net, [top1 for top1, _ in epochs[seed]]) for seed in seeds]
            validation = [_of(net, [scores for _, scores in epochs[seed]]) for seed in seeds]
            if mean := _mean(train):
                curves.train[name, net] = mean
            if mean := _mean(validation):
                curves.validation[name, net] = mean
    return curves


Scores = tuple[dict[str, float], dict[str, float]]
"""Top-1 accuracies on training and on validation images, by net."""


def _epochs(folder: Path, runs: Iterable[str], curves: Curves) -> list[Scores]:
    """Accuracies on training and on validation images of all epochs of one seed's runs.

    A run that starts from another's full-net in the same comparison has that one's epochs too.
    """
    found: list[Scores] = []
    for name in runs:
        try:
            run = RunFolder.open(folder / "runs" / name)
            epochs = run.metrics()
            began = run.recipe.network.weights
            if began is not None and not began.is_absolute():
                epochs = RunFolder.open(run.path / began).metrics() + epochs
            found += _until_they_join(
                [
                    (
                        epoch.get("train_top1", {}),
                        {net: top["top1"] for net, top in epoch.get("validation", {}).items()},
                    )
                    for epoch in epochs
                ]
            )
        except (DDNNError, OSError):
            curves.unreadable.append(name)
    return found


def _until_they_join(epochs: list[Scores]) -> list[Scores]:
    """With NaN for nets that come later only."""
    every = [dict.fromkeys(scores, math.nan) for scores in epochs[-1]] if epochs else []
    return [(every[0] | train, every[1] | validation) for train, validation in epochs]


def _of(net: str, epochs: Iterable[Mapping[str, float]]) -> list[float]:
    """One net's accuracies, of the epochs of runs that train it."""
    return [top1[net] for top1 in epochs if net in top1]


def _mean(curves: list[list[float]]) -> list[float]:
    """Mean by epoch over the curves that have begun, as far as all of them go."""
    return [statistics.fmean(scores) for scores in zip(*filter(None, curves), strict=False)]
