"""`torch.compile` of a network's forward and, with it, of its backward.

On a CPU a small network waits for its memory, and what a compiler gains is to go through a feature less often: a batch
norm, the sum with the residual, the activation and the energy of a feature take three passes together, not eleven. Two
of the compiler's own formulas stand in the way, and are given here in another form:

- Statistics of a batch norm. Welford's recurrence, one position after the other, and on few channels by one thread,
  becomes sums over each image, then over images. They are sums of differences from one value of the channel, as the
  square of a mean much larger than its deviation would swallow the variance.
- The gradient of an activation. Where it is 0 is kept as one byte a value, and writing bytes takes longer than all else
  together. In terms of the activation's output there is nothing to keep: the next layer keeps that already.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ddnn.energy import precise
from ddnn.errors import RunError

aten = torch.ops.aten

Formula = Callable[..., Any]
F = TypeVar("F", bound=Formula)


def compiled(forward: F, device: torch.device) -> F:
    """`forward`, compiled at its first call, which takes from 45 s (ResNet-8/14/20) to minutes.

    The same within rounding. On a CPU it is compiled anew for inputs of another shape. Raises `RunError` where a CPU
    has no C++ compiler.
    """
    check_compiler(device)
    if device.type != "cpu":
        return cast(F, torch.compile(forward))
    return cast(F, torch.compile(forward, backend=_for_cpu, dynamic=False))


def check_compiler(device: torch.device) -> None:
    """`RunError` where a CPU has no C++ compiler."""
    if device.type != "cpu":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RunError(
            "train.compile=true needs a C++ compiler to compile for a CPU, and none was found; install g++, name one "
            "in the environment variable CXX, or leave train.compile=false"
        ) from None


def _for_cpu(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The compiler that torch has, with the formulas of this module."""
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    formulas: dict[Any, Formula] = dict(select_decomp_table())
    for operator, ours in (
        (aten._native_batch_norm_legit_functional.default, batch_norm),
        (aten.native_batch_norm_backward.default, batch_norm_backward),
        (aten.threshold_backward.default, threshold_backward),
    ):
        formulas[operator] = _instead(ours, formulas[operator])

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], *, get_decomp_fn: Any = None, **named: Any) -> Any:
        # Formulas are in the graph by now. A table that is not its own would keep the compiler from caching what it
        # makes of the graph.
        return compile_fx_inner(graph, inputs, **named)  # type: ignore[arg-type]

    # Another cache goes by the graph before formulas are put in, and without the tag would give one compiled with
    # others. With both a second start takes a tenth of the first.
    tagged = torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag + _version)  # type: ignore[attr-defined]
    with tagged, functorch.patch(autograd_cache_allow_custom_autograd_functions=True):
        return compile_fx(graph, inputs, inner, decompositions=formulas)  # type: ignore[arg-type]


def _instead(ours: Formula, theirs: Formula) -> Formula:
    """`ours` where it is for this case, else `theirs`."""

    def formula(*given: Any, **named: Any) -> Any:
        made = ours(*given, **named)
        return theirs(*given, **named) if made is NotImplemented else made

    return formula


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """In training, of a map [N, C, H, W]: it normalised, mean, 1 / deviation, and what running statistics become."""
    if not training or x.ndim != 4 or weight is None or bias is None:
        return NotImplemented
    values = x.to(precise(x))
    positions = x.numel() // x.shape[1]
    origin = values[0, :, x.shape[2] // 2, x.shape[3] // 2]
    distance = values - _along_channels(origin)
    mean = _over_positions(distance) / positions
    variance = (_over_positions(distance.square()) / positions - mean.square()).clamp_min(0)
    mean = origin + mean
    scale = torch.rsqrt(variance + eps)
    y = (values - _along_channels(mean)) * _along_channels(scale * weight) + _along_channels(bias)
    unbiased = variance * (positions / (positions - 1))
    return (
        y.to(x.dtype),
        mean,
        scale,
        running_mean + momentum * (mean - running_mean),
        running_var + momentum * (unbiased - running_var),
    )


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """Gradients of the map, the weight and the bias."""
    if not training or x.ndim != 4 or weight is None or mean is None or scale is None:
        return NotImplemented
    positions = x.numel() // x.shape[1]
    coming = gradient.to(precise(gradient))
    normalised = (x.to(precise(x)) - _along_channels(mean)) * _along_channels(scale)
    of_bias, of_weight = _over_positions(coming), _over_positions(coming * normalised)
    shared = _along_channels(of_bias / positions) + normalised * _along_channels(of_weight / positions)
    of_x = ((coming - shared) * _along_channels(scale * weight)).to(x.dtype)
    return tuple(made if want else None for made, want in zip((of_x, of_weight, of_bias), wanted, strict=True))


def threshold_backward(gradient: Tensor, y: Tensor, threshold: float) -> Any:
    """Of ReLU, from its output: the gradient where that is above 0. One that is not finite may become NaN elsewhere."""
    if threshold != 0:
        return NotImplemented
    return (gradient.to(precise(gradient)) * y.to(precise(y)).sign().clamp_min(0)).to(gradient.dtype)


def _along_channels(values: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]."""
    return values.view(1, -1, 1, 1)


def _over_positions(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [C], the sums; first over each image, which all threads can do."""
    return x.sum(dim=(2, 3)).sum(dim=0)


def _digest(*functions: Callable[..., Any]) -> str:
    """Hex SHA-256 of what functions do, and not of where they stand."""

    def parts(code: CodeType) -> Iterator[str]:
        yield repr((code.co_code, code.co_names))
        for constant in code.co_consts:
            yield from parts(constant) if isinstance(constant, CodeType) else [repr(constant)]

    every = [part for function in functions for part in parts(function.__code__)]
    return hashlib.sha256("\n".join(every).encode()).hexdigest()


_version = _digest(batch_norm, batch_norm_backward, threshold_backward, _along_channels, _over_positions, precise)
"""Of the formulas, as they were imported."""
