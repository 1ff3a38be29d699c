"""Full-nets by name: fresh or pretrained networks of torchvision, timm and this project's own CIFAR ResNet."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from ddnn.errors import RecipeError, first_line
from ddnn.families import cifar_resnet, torchvision_resnet

Options = Mapping[str, Any]


def create(
    name: str,
    *,
    num_classes: int,
    width: int = 16,
    image_size: int | None = None,
    pretrained: bool = False,
    options: Options | None = None,
) -> nn.Module:
    """The network `library/NAME`, with fresh weights from the global random generator, or those its library offers.

    `options` go to the library's own function. `image_size`, in pixels, is told to those networks that are made for one
    size. A pretrained network's classifier is fresh where it has another number of classes. Raises `RecipeError` for a
    name, option or weights that are not there.
    """
    library, _, network = name.partition("/")
    makers = {"cifar": _cifar, "torchvision": _torchvision, "timm": _timm}
    if library not in makers or not network:
        raise RecipeError(f"network.name: no network {name!r}; cifar/resnetN, torchvision/NAME and timm/NAME are some")
    try:
        return makers[library](network, num_classes, width, image_size, pretrained, dict(options or {}))
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"network.name: {name} can't be made as asked for: {error}") from None


def _cifar(
    network: str, num_classes: int, width: int, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    names = [f"resnet{n}" for n in cifar_resnet.LAYERS]
    if network not in names:
        raise _unknown("cifar", network, names)
    if pretrained:
        raise RecipeError(f"network.pretrained: there are no weights of cifar/{network}; give network.weights")
    return cifar_resnet.resnet(int(network.removeprefix("resnet")), num_classes=num_classes, width=width, **options)


def _torchvision(
    network: str, num_classes: int, width: int, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    models = torchvision.models
    own = [name for name in torchvision_resnet.BLOCKS if not hasattr(models, name)]
    if network in own:
        if pretrained:
            raise RecipeError(f"network.pretrained: torchvision has no {network}, and so no weights of it")
        return torchvision_resnet.resnet(network, num_classes=num_classes, **options)
    names = models.list_models(module=models)
    if network not in names:
        raise _unknown("torchvision", network, [*own, *names])
    if network.startswith("vit_") and image_size is not None:
        options = {"image_size": image_size, **options}
    if "aux_logits" in inspect.signature(models.get_model_builder(network)).parameters or network == "inception_v3":
        options = {"aux_logits": False, "init_weights": True, **options}  # a classifier beside the last is no net's
    net: nn.Module = models.get_model(network, weights=None, num_classes=num_classes, **options)
    if pretrained:
        weights = _download(network, lambda: models.get_model_weights(network).DEFAULT.get_state_dict(progress=False))
        if isinstance(net, VisionTransformer):
            weights = interpolate_embeddings(net.image_size, net.patch_size, weights)
        fill(net, weights)
    return net


def _timm(
    network: str, num_classes: int, width: int, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise RecipeError(
            f"network.name: timm/{network} needs timm; install it with: pip install 'ddnn[timm]'"
        ) from None
    hub = ":" in network
    if not hub and not timm.is_model(network):
        raise _unknown("timm", network, timm.list_models())
    declared = None if hub else timm.get_pretrained_cfg(network)
    if image_size is not None and declared is not None and declared.fixed_input_size:
        options = {"img_size": image_size, **options}

    def made() -> nn.Module:
        net: nn.Module = timm.create_model(network, pretrained=pretrained, num_classes=num_classes, **options)
        return net

    return _download(network, made) if pretrained or hub else made()


def fill(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights, leaving out those that have another shape than the network's: of a classifier for other classes."""
    ours = net.state_dict()
    net.load_state_dict({**ours, **{k: t for k, t in weights.items() if k in ours and t.shape == ours[k].shape}})


def _download(network: str, get: Any) -> Any:
    try:
        return get()
    except Exception as error:  # a network, a disk, a hub: anything may fail
        raise RecipeError(
            f"network.pretrained: cannot get the weights of {network} ({first_line(error)}); with a file of "
            "them, give network.weights instead"
        ) from None


def _unknown(library: str, network: str, names: list[str]) -> RecipeError:
    close = difflib.get_close_matches(network, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(f'{library}/{name}' for name in close)}?" if close else f"{len(names)} are known"
    return RecipeError(f"network.name: {library} has no network {network!r}; {hint}")
