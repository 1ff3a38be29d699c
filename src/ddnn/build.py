"""From the `network` section of a recipe to a DDNN."""

import copy
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddnn.errors import RecipeError
from ddnn.families import PRESETS
from ddnn.families import build as build_full_net
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.recipe import Network, Recipe


def build(network: Network, num_classes: int) -> DDNN:
    """A DDNN as the recipe says, with fresh weights from the global random generator, or the recipe's `weights`."""
    full_net, table = build_full_net(network.name, num_classes, network.width)
    if network.weights is not None:
        load_weights(full_net, network.weights)
    subnets = table if network.subnets is None else network.subnets
    name = network.name.rpartition("/")[2] if network.name not in PRESETS else list(PRESETS[network.name].depths)[-1]
    net = nest(full_net, subnets, full_name=name, norm=network.norm, head=network.head)
    if network.alone is None:
        return net
    if network.alone not in net.depths:
        raise RecipeError(f"network.alone: no net {network.alone!r} in the table; it has {', '.join(net.depths)}")
    return nest(
        copy.deepcopy(net.nets[network.alone]), {}, full_name=network.alone, norm=network.norm, head=network.head
    )


def check(recipe: Recipe) -> None:
    """Raise what is wrong with the recipe's networks, without their weights or data."""
    net = build(recipe.network.model_copy(update={"weights": None}), num_classes=2)
    objective = EKD(**recipe.objective.model_dump(exclude={"teacher"}))
    if len(net.depths) > 1:
        objective.check(list(net.depths)[:-1])


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict strictly into an ordinary network; `RecipeError` says what does not fit."""
    weights = _read(path)
    ours = net.state_dict()
    # Files from before 2018 lack these counters, which nothing but cumulative averages reads; torch allows that too.
    missing = [k for k in ours if k not in weights and not k.endswith("num_batches_tracked")]
    surplus = [k for k in weights if k not in ours]
    if missing or surplus:
        example = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the network lacks"
        raise RecipeError(
            f"network.weights: {path} is of another network: {len(missing)} tensors missing, "
            f"{len(surplus)} too many; it {example}"
        )
    for name, tensor in weights.items():
        if tensor.shape != ours[name].shape:
            raise RecipeError(
                f"network.weights: {path} holds {name} of shape {tuple(tensor.shape)}, "
                f"the network needs {tuple(ours[name].shape)}"
                + (" (trained for another number of classes?)" if tensor.shape[1:] == ours[name].shape[1:] else "")
            )
    net.load_state_dict(weights, strict=not any(k not in weights for k in ours))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RecipeError(f"network.weights: there is no file {path}") from None
    except pickle.UnpicklingError:
        raise RecipeError(
            f"network.weights: {path} is damaged or holds more than weights, and is not loaded; save a state dict"
        ) from None
    except Exception:  # a damaged file can make the readers raise nearly anything
        raise RecipeError(f"network.weights: {path} is damaged, or neither safetensors nor a PyTorch file") from None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise RecipeError(f"network.weights: {path} is not a state dict (names to tensors)")
    return weights
