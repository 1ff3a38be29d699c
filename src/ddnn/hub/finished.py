"""A finished run in the conventions of the hub."""

from pathlib import Path
from typing import Any

from ddnn.checkpoint import RunFolder
from ddnn.families import PRESETS
from ddnn.hub.config import Config, Network, Preprocessing
from ddnn.hub.evidence import of_run
from ddnn.hub.folder import save_pretrained
from ddnn.hub.plain import save_for_timm
from ddnn.network import DDNN
from ddnn.trained import load_trained


def save_run(
    run: RunFolder,
    folder: Path,
    *,
    comparison: Path | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Config:
    """Write all nets of a finished run, with a card that holds its table and what its comparison says.

    `comparison` is the folder of a `ddnn compare` of the same networks and data, by default the one that the run is
    part of. Raises `HubError` where it is about others.
    """
    evidence = of_run(run, comparison)
    net, about = load_trained(run)
    return save_pretrained(
        net, folder, network=_network(run, net), classes=about["data"]["classes"],
        preprocessing=_preprocessing(run, about), evidence=evidence, license=license, repo_id=repo_id,
    )  # fmt: skip


def save_subnet_of_run(
    run: RunFolder,
    name: str,
    folder: Path,
    *,
    architecture: str | None = None,
    comparison: Path | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> str:
    """Write one net of a finished run as an ordinary network that `timm.create_model` loads; timm's name for it.

    `architecture` is that name; if not given, the net's own and the full-net's are tried, at the net's depths.
    """
    evidence = of_run(run, comparison)
    net, about = load_trained(run)
    network = _network(run, net)
    return save_for_timm(
        net, name, folder, architecture=architecture or (name, network.name.rpartition("/")[2]),
        options=network.options if network.name.startswith("timm/") else None,
        classes=about["data"]["classes"], preprocessing=_preprocessing(run, about), evidence=evidence, license=license,
        repo_id=repo_id,
    )  # fmt: skip


def _network(run: RunFolder, net: DDNN) -> Network:
    asked = run.recipe.network
    name = PRESETS[asked.name].full_net if asked.name in PRESETS else asked.name
    if name.startswith("timm/") and ":" in name:  # the address of weights, from which the run only started
        name = f"timm/{net.nets[net.full_name].pretrained_cfg['architecture']}"  # type: ignore[index]
    return Network(name=name, width=asked.width, options=asked.options, stages=asked.stages)


def _preprocessing(run: RunFolder, about: dict[str, Any]) -> Preprocessing:
    """As `data.load` makes evaluation resize images, and `data.eval_batches` normalise them."""
    data = about["data"]
    size = data["image_size"]
    resize = run.recipe.data.shorter_side(size)
    return Preprocessing(size=size, resize=resize, mean=data["mean"], std=data["std"])
