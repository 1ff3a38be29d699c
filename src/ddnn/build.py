"""From the `network` section of a recipe to a DDNN."""

import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddnn.errors import RecipeError, first_line
from ddnn.families import PRESETS, anatomy_of
from ddnn.families import build as build_full_net
from ddnn.families.cifar_resnet import CifarResNet
from ddnn.families.discover import behaviour
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.recipe import Network, Recipe


def build(network: Network, num_classes: int, image_size: int | None = None) -> DDNN:
    """A DDNN as the recipe says, with fresh weights from the global random generator, or those to start from.

    `image_size`, in pixels, is that of the images it is for, where it is known.
    """
    full_net, table = build_full_net(
        network.name,
        num_classes,
        network.width,
        image_size=image_size,
        pretrained=network.pretrained,
        options=network.options,
    )
    if image_size is not None and not isinstance(full_net, CifarResNet):  # which takes any
        _check_size(full_net, network.name, image_size)
    if network.weights is not None:
        load_weights(full_net, network.weights, fresh_classifier=network.fresh_classifier, stages=network.stages)
    net = nest(
        full_net,
        table if network.subnets is None else network.subnets,
        full_name=full_name(network.name),
        norm=network.norm,
        head=network.head,
        stages=network.stages,
        example=None
        if image_size is None
        else torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)),
    )
    if network.alone is None:
        return net
    if network.alone not in net.depths:
        raise RecipeError(f"network.alone: no net {network.alone!r} in the table; it has {', '.join(net.depths)}")
    return net.alone(network.alone)


def check(recipe: Recipe) -> list[str]:
    """The names of the recipe's nets, the full-net last; raises what is wrong with them, without weights or data."""
    nets = list(build(recipe.network.unweighted(), num_classes=2, image_size=recipe.data.image_size).depths)
    if recipe.network.subnets and recipe.network.alone is None and len(nets) == 1:
        raise RecipeError(
            f"network.subnets: {nets[0]} has all blocks of {recipe.network.name}, so it is the full-net and nothing is "
            "nested in it; give it fewer"
        )
    make_objective(recipe, nets)
    return nets


def make_objective(recipe: Recipe, nets: Sequence[str]) -> EKD:
    """The recipe's objective for these nets, the full-net last; `DDNNError` where it weighs others than are taught."""
    objective = EKD(**recipe.objective.model_dump(exclude={"teacher"}))
    students = nets if recipe.objective.teacher is not None else nets[:-1]
    if students:
        objective.check(students)
    return objective


def load_weights(
    net: nn.Module, path: Path, *, fresh_classifier: bool = False, stages: Sequence[str] | None = None
) -> None:
    """Load the weights of an ordinary network, or of a run's full-net, strictly; `RecipeError` says what does not fit.

    With `fresh_classifier` the net's classifier is left as it is. `stages` are their names where they have to be given.
    """
    ours = net.state_dict()
    weights = _of_full_net(_read(path), ours.keys(), path)
    # Files from before 2018 lack these counters, which nothing but cumulative averages reads; torch allows that too.
    missing = [k for k in ours if k not in weights and not k.endswith("num_batches_tracked")]
    surplus = [k for k in weights if k not in ours]
    if missing or surplus:
        example = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the network lacks"
        raise RecipeError(
            f"network.weights: {path} is of another network: {len(missing)} tensors missing, "
            f"{len(surplus)} too many; it {example}"
        )
    differing = [name for name, tensor in weights.items() if tensor.shape != ours[name].shape]
    classifier = _classifier(net, stages) if differing or fresh_classifier else ()
    if differing:
        name = differing[0]
        shapes = f"{name} of shape {tuple(weights[name].shape)}, the network needs {tuple(ours[name].shape)}"
        if not _only_classes(classifier, {name: (weights[name], ours[name]) for name in differing}):
            raise RecipeError(f"network.weights: {path} is of another network: it holds {shapes}")
        if not fresh_classifier:
            raise RecipeError(
                f"network.weights: {path} was trained for another number of classes: it holds {shapes}; "
                "network.fresh_classifier=true takes everything but the classifier"
            )
    fresh = classifier if fresh_classifier else ()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(fresh)}
    net.load_state_dict(kept, strict=not fresh and all(k in weights for k in ours))


def _only_classes(classifier: tuple[str, ...], differing: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether these tensors differ in nothing but the number of classes."""
    return all(
        name.startswith(classifier) and theirs.shape[1:] == ours.shape[1:] for name, (theirs, ours) in differing.items()
    )


def _classifier(net: nn.Module, stages: Sequence[str] | None) -> tuple[str, ...]:
    """How the names of its tensors begin."""
    anatomy, _ = anatomy_of(net, stages=stages)
    return tuple(f"{layer}." for layer in anatomy.classifier(net))


def _of_full_net(weights: dict[str, Tensor], names: Collection[str], path: Path) -> dict[str, Tensor]:
    """The full-net's tensors where the file holds all nets of a run, under their library's names."""
    if not weights or not all(name.startswith("nets.") or name == "calibrated" for name in weights):
        return weights
    nets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name != "calibrated":
            _, net, inner = name.split(".", 2)
            nets.setdefault(net, {})[inner] = tensor
    whole = {net: held for net, held in nets.items() if held.keys() == set(names)}
    if len(whole) != 1:
        held = ", ".join(f"{net} ({len(tensors)} tensors)" for net, tensors in nets.items())
        raise RecipeError(
            f"network.weights: {path} holds a run's nets, {held}, and not one that is this recipe's full-net "
            f"({len(names)} tensors); take one out with ddnn extract"
        )
    return next(iter(whole.values()))


def _check_size(net: nn.Module, name: str, image_size: int) -> None:
    try:
        behaviour(net, torch.empty(2, 3, image_size, image_size))
    except Exception as error:  # whatever a forward may raise
        raise RecipeError(
            f"network.name: {name} can't run on images of {image_size} px: {first_line(error)}; data.image_size sets "
            "another size"
        ) from None


def full_name(network: str) -> str:
    """What the full-net is called: the library's name for it, or the preset's last."""
    if network in PRESETS:
        return list(PRESETS[network].depths)[-1]
    return re.sub(r"[^A-Za-z0-9_-]", "_", re.split(r"[/:]", network)[-1])


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise RecipeError(f"network.weights: {path} is no folder of a finished run: it has no model.safetensors")
        path = path / "model.safetensors"
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
