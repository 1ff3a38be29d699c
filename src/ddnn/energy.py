"""The energy of a feature, from which its attention map is made, and its place in the forward of a network.

The energy is the sum over channels of squares (Zagoruyko and Komodakis 2017, arXiv 1612.03928). It is a small map of a
large feature, and for small networks reading that feature is what attention distillation costs. `energy` reads it once
in each direction and writes its gradient, which autograd then adds to that of the path. `fork`, in the forward of the
network, does better: the feature has only just been written, and going backward both gradients arrive together, so that
one pass makes their sum and no second gradient of the feature's size is ever held.
"""

from typing import Any

import torch
from torch import Tensor

VECTOR_BYTES = 64
"""Of a CPU with AVX-512."""


def energy(feature: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W] in float32 or better, `feature.square().sum(dim=1).flatten(1)` written out."""
    if torch.compiler.is_compiling():  # which fuses the formula as it is, better than what is written by hand
        return _literal(feature)
    made: Tensor = _Energy.apply(feature)
    return made


def fork(feature: Tensor) -> tuple[Tensor, Tensor]:
    """`feature` [N, C, H, W], to go on with, and its `energy`. Whoever uses the feature itself must use the first."""
    if torch.compiler.is_compiling():
        return feature, _literal(feature)
    onward, made = _Fork.apply(feature)
    return onward, made


def precise(x: Tensor) -> torch.dtype:
    """float32 for what is less precise: distances of posteriors and maps are small differences."""
    return torch.promote_types(x.dtype, torch.float32)


def _literal(feature: Tensor) -> Tensor:
    return feature.to(precise(feature)).square().sum(dim=1).flatten(1)


def _summed_squares(feature: Tensor) -> Tensor:
    """Without ever holding the squares."""
    return torch.linalg.vector_norm(feature, dim=1, dtype=precise(feature)).square().flatten(1)


def _factor(feature: Tensor, gradient: Tensor) -> Tensor:
    """f [N, 1, H, W], so that the gradient of a feature is f times the feature, from that of its energy."""
    n, c, h, w = feature.shape
    factor = (2 * gradient).view(n, 1, h, w)
    if feature.dtype == torch.float16:  # whose range a scaled loss exceeds before the feature makes it small again
        return factor
    factor = factor.to(feature.dtype)
    if feature.device.type == "cpu" and c * feature.element_size() < VECTOR_BYTES and channels_last(feature):
        # repeated while they multiply, factors of so few neighbours take five times as long as repeated before
        return factor.expand_as(feature).contiguous(memory_format=torch.channels_last)
    return factor


def channels_last(x: Tensor) -> bool:
    """Whether a map [N, C, H, W] lies in memory with its channels next to each other, and not in order."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        return _summed_squares(feature)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        (feature,) = ctx.saved_tensors
        return (feature * _factor(feature, gradient[0])).to(feature.dtype)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(feature)
        return feature.view_as(feature), _summed_squares(feature)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (feature,) = ctx.saved_tensors
        of_feature, of_energy = gradients
        if of_energy is None:
            return of_feature
        factor = _factor(feature, of_energy)
        if of_feature is None:
            return (feature * factor).to(feature.dtype)
        return torch.addcmul(of_feature, feature, factor).to(feature.dtype)
