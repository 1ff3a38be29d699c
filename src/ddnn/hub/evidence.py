"""What was measured of a model, and where that comes from."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddnn import recipe as recipes
from ddnn.checkpoint import RunFolder
from ddnn.errors import DDNNError, HubError
from ddnn.evaluate import Measures
from ddnn.network import DDNN
from ddnn.report.comparison import Comparison, read

METHOD = ("objective", "optim", "schedule", "augment")
"""Parts of a recipe that must be those of a comparison for its results to be about a run of that recipe."""
LENGTH = ("epochs", "full_net_share", "batch_size", "ema")
"""The same of its `train`; what else is in there is seeds and settings of machines."""


@dataclass(frozen=True)
class Evidence:
    """The table of sub-nets, and what is known of how it came about."""

    subnets: Mapping[str, Measures]
    """By name of the net, the full-net last: what `ddnn.evaluate.evaluate` returns."""
    dataset: str
    """Name of the data set; a folder's without what leads to it."""
    test_images: int
    latency: str | None = None
    """What latency was measured on."""
    training: Mapping[str, str] = field(default_factory=dict)
    """Epochs, seed, machine ... in the order to show them."""
    recipe: str | None = None
    """The resolved recipe as TOML."""
    taught: bool = False
    """Whether the full-net taught the other nets in training."""
    comparison: Comparison | None = None
    """Of the same networks on the same data: `ddnn compare`."""

    def check(self, net: DDNN) -> None:
        """`HubError` unless this is about these nets."""
        told = {name: tuple(row["depths"]) for name, row in self.subnets.items()}
        if told != net.depths:
            raise HubError(f"the evidence is about the nets {_table(told)}, the network has {_table(net.depths)}")


def of_run(run: RunFolder, comparison: Path | None = None) -> Evidence:
    """What a finished run and the comparison it belongs to say.

    If no folder of a comparison is given, and the run is the `ekd` of one, that is taken: what a card says of a
    comparison is said of `ekd`. Nothing tells where on this machine things lie. Raises `HubError` for a comparison of
    other networks, data or settings, `RunError` for a run that has not ended.
    """
    about, summary = run.finished()
    place = run.path.resolve()
    around = place.parent.parent
    ours = place.parent.name == "runs" and place.name.startswith("ekd-seed")
    if comparison is None and ours and (around / "comparison.json").is_file():
        comparison = around
    images = about["data"]["images"]
    first = run.recipe.train.full_net_epochs if len(summary["subnets"]) > 1 else 0
    training = {
        "data": f"{without_folders(summary['dataset']['source'])}, {images['train']:,} training images",
        "epochs": f"{summary['epochs']}{f', the first {first} of the full-net by itself' if first else ''}",
        "seed": str(summary["seed"]),
        "time": f"{summary['train_seconds']:.0f} s",
        "machine": about["machine"]["device"],
        "versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        "commit of ddnn": about["commit"] or "",
    }
    return Evidence(
        subnets=summary["subnets"],
        dataset=without_folders(summary["dataset"]["source"]),
        test_images=summary["dataset"]["test_images"],
        latency=summary["latency"],
        training={what: value for what, value in training.items() if value},
        taught=len(summary["subnets"]) > 1 and run.recipe.objective.teacher is None and run.recipe.objective.distils,
        recipe=without_folders(run.recipe.to_toml()),
        comparison=None if comparison is None else _matching(comparison, run, summary),
    )


def without_folders(text: str) -> str:
    """The text with every absolute path in it cut to its last part: what is published tells nothing of a machine."""
    return re.sub(r"(?<![\w.:/~-])/(?:[^\s\"'/]+/)*(?=[^\s\"'/])", "", text)


def _matching(folder: Path, run: RunFolder, summary: Mapping[str, Any]) -> Comparison:
    try:
        comparison = read(folder)
    except DDNNError as error:
        raise HubError(str(error)) from None
    told = {name: tuple(net.depths) for name, net in comparison.nets.items()}
    ours = {name: tuple(row["depths"]) for name, row in summary["subnets"].items()}
    if told != ours:
        raise HubError(f"the comparison in {folder} is about the nets {_table(told)}, the run has {_table(ours)}")
    if comparison.dataset != run.recipe.data.source:
        raise HubError(
            f"the comparison in {folder} is about the data {comparison.dataset}, the run about {run.recipe.data.source}"
        )
    if (folder / "recipe.toml").is_file():
        theirs = recipes.reopen(folder / "recipe.toml")
        differing = [name for name in METHOD if getattr(theirs, name) != getattr(run.recipe, name)]
        lengths = (theirs.train, run.recipe.train)
        differing += [f"train.{name}" for name in LENGTH if len({getattr(train, name) for train in lengths}) > 1]
        if differing:
            raise HubError(
                f"the comparison in {folder} is of another recipe than the run's, with other settings of "
                f"{', '.join(differing)}; what it says is not said of this run"
            )
    hidden = {"dataset": without_folders(comparison.dataset), "recipe": without_folders(comparison.recipe)}
    return comparison.model_copy(update=hidden)


def _table(depths: Mapping[str, tuple[int, ...]]) -> str:
    return json.dumps({name: list(kept) for name, kept in depths.items()})
