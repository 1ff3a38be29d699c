"""DenseNet (Huang et al. 2017, arXiv 1608.06993, table 1), torchvision's and timm's.

A layer of a dense block adds its output to its input as further channels. So a sub-net with fewer layers in a block is
narrower from there on: the transition after it, the first convolution of every later layer and the classifier take
fewer channels than the full-net's. Those tensors can't be shared and are private to the sub-net; they begin as the
full-net's, without the channels that are missing. All others are shared as everywhere.
"""

import copy
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ddnn.families.family import Family, instance_of


def _fit(subnet: Any, full: Any) -> None:
    """Give a sub-net with fewer layers the widths that follow from them."""
    blocks = [name for name, _ in full.features.named_children() if name.startswith("denseblock")]
    transitions = [name for name, _ in full.features.named_children() if name.startswith("transition")]
    kept = torch.arange(_first(full.features.get_submodule(blocks[0])).norm1.num_features)
    for block, transition in zip_longest(blocks, transitions):
        layers = list(subnet.features.get_submodule(block).children())
        first = _first(full.features.get_submodule(block))
        width, growth = first.norm1.num_features, first.conv2.out_channels
        for i, layer in enumerate(layers):
            here = torch.cat([kept, width + torch.arange(growth * i)])
            _narrow(layer, "norm1", here)
            _narrow(layer, "conv1", here)
        kept = torch.cat([kept, width + torch.arange(growth * len(layers))])
        if transition is not None:
            half = torch.arange(len(kept) // 2)
            _narrow(subnet.features.get_submodule(transition), "norm", kept)
            _narrow(subnet.features.get_submodule(transition), "conv", kept, half)
            kept = half
    _narrow(subnet.features, "norm5", kept)
    _narrow(subnet, "classifier", kept)


def _first(block: Any) -> Any:
    return next(iter(block.children()))


def _narrow(holder: nn.Module, name: str, takes: Tensor, gives: Tensor | None = None) -> None:
    """Replace a layer by one that has only these channels, if it has others."""
    layer: Any = holder.get_submodule(name)
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        if layer.num_features != len(takes):
            holder._modules[name] = _sliced(layer, takes, None, num_features=len(takes))
    elif isinstance(layer, nn.Linear):
        if layer.in_features != len(takes):
            holder._modules[name] = _sliced(layer, None, takes, in_features=len(takes))
    elif isinstance(layer, nn.Conv2d) and layer.in_channels != len(takes):
        out = len(gives) if gives is not None else layer.out_channels
        holder._modules[name] = _sliced(layer, gives, takes, in_channels=len(takes), out_channels=out)


def _sliced(layer: nn.Module, first: Tensor | None, second: Tensor | None, **sizes: int) -> nn.Module:
    """A copy of the layer with these entries of the first and second dimension of its tensors."""

    def taken(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        for dim, entries in enumerate((first, second)):
            if entries is not None and tensor.ndim > dim:
                tensor = tensor.index_select(dim, entries.to(tensor.device))
        return tensor.clone()

    narrow = copy.copy(layer)
    narrow.__dict__ |= sizes
    narrow._parameters = {
        name: None if p is None else nn.Parameter(taken(p), p.requires_grad) for name, p in layer._parameters.items()
    }
    narrow._buffers = {name: None if b is None else taken(b) for name, b in layer._buffers.items()}
    return narrow


FAMILY = Family(
    "DenseNet",
    instance_of("torchvision.models.densenet.DenseNet", "timm.models.densenet.DenseNet"),
    stages=("features.denseblock*",),
    dense=True,
    fit=_fit,
)
