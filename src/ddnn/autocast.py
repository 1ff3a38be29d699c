"""The forward of a training step: torch's autocast to 16 bits and, on a CPU, convolutions of few positions as products.

Deep in a network a feature has few positions and many channels. Of a convolution there, the library moves the weights
about, into the layout of its kernels and back, for longer than it multiplies: 512 channels on 2 x 2 positions take five
times as long as the matrix product of the same numbers in 16 bits, the gradient of their weights ten times. So such
convolutions are written as what they are, a product of the windows of the image, one to a row, with the weights.

In float32 it is the gradient of the weights alone that is worth it, two to five times as fast on few positions. All
that goes forward stays the library's, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddnn.device import avx2_at_most
from ddnn.energy import channels_last

FEW = 4096
"""Positions, of all images of a batch together, up to which a convolution of 1 x 1 is better off as a product."""
COPIED = 2
"""A larger kernel's windows must be copied first. That pays while positions x COPIED <= channels of what is made: the
outputs' going forward, the inputs' for the gradient of the image."""
COPIED_FOR_WEIGHTS = 8
"""For the gradient of the weights, with which the library is slower, that pays while positions <= this x output
channels."""

AVX2 = avx2_at_most()

WIDE = 128
"""Channels of an output with less than which a network has nothing to gain."""

Pair = tuple[int, int]


class Parts(NamedTuple):
    """Of a convolution, which are matrix products."""

    forward: bool
    of_image: bool
    of_weight: bool
    """The gradients."""


NONE = Parts(forward=False, of_image=False, of_weight=False)


@contextmanager
def autocast(net: nn.Module, device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 if `enabled`, and on a CPU, then or not, `MatrixProducts` if the net may gain by them.

    For a forward of this net alone: backward, and losses, belong outside.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        # to look at every call costs a network of few channels a fiftieth of its step
        if device.type == "cpu" and any(map(_wide, net.modules())):
            with MatrixProducts():
                yield
        else:
            yield


def _wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.out_channels >= WIDE


class MatrixProducts(TorchFunctionMode):
    """Within it, on a CPU, `conv2d` of few positions is a matrix product under autocast to bfloat16.

    The same within rounding to 16 bits; sums are in 32, as the library's. In float32 without autocast the gradient of
    the weights is one, and the rest the library's. Whatever comes in float64, and convolutions with groups, dilation or
    bias, are left alone. The networks stay as they are: it is the call that is another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.halved: dict[tuple[Tensor, bool], Tensor] = {}
        """Weights in 16 bits: shared ones are needed several times, and autocast keeps its own copies to itself."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d:
            return self.conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
    ) -> Tensor:
        """`torch.conv2d`."""
        plain = bias is None and groups == 1 and _pair(dilation) == (1, 1) and input.ndim == 4
        halves = _halves(input) and _halves(weight)
        if plain and not isinstance(padding, str) and (halves or (_single(input) and _single(weight))):
            how = (_pair(stride), _pair(padding))
            parts = (_as_products if halves else _as_products_in_float32)(input.shape, weight.shape, *how)
            if any(parts):
                given = (input.to(torch.bfloat16), self.half(weight)) if halves else (input, weight)
                made: Tensor = Convolution.apply(*given, *how, parts)
                return made
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]

    def half(self, weight: Tensor) -> Tensor:
        """The weight in 16 bits; kept where autocast would keep it. A compiler merges equal casts by itself."""
        keeps = weight.is_leaf and weight.requires_grad and torch.is_autocast_cache_enabled()
        if not keeps or torch.compiler.is_compiling():
            return weight.to(torch.bfloat16)
        key = (weight, torch.is_grad_enabled())
        if key not in self.halved:
            self.halved[key] = weight.to(torch.bfloat16)
        return self.halved[key]


class Convolution(torch.autograd.Function):
    """A convolution [N, C, H, W] with weights [D, C, h, w], of which these parts are matrix products."""

    @staticmethod
    def forward(image: Tensor, weight: Tensor, stride: Pair, padding: Pair, parts: Parts) -> Tensor:
        """To a map [N, D, H', W']."""
        if not parts.forward:
            return torch.conv2d(image, weight, None, stride, padding)
        size = _size(image.shape, weight.shape, stride, padding)
        y = _map(_windows(image, _kernel(weight.shape), stride, padding) @ _rows(weight).t(), len(image), size)
        return y if channels_last(image) or channels_last(weight) else y.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pair, Pair, Parts], output: Tensor) -> None:
        """Keep what backward needs."""
        image, weight, ctx.stride, ctx.padding, ctx.parts = inputs
        ctx.save_for_backward(image, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """To those of image and weight."""
        (gradient,) = gradients
        image, weight = ctx.saved_tensors
        wants_image, wants_weight, *_ = ctx.needs_input_grad
        kernel, channels = _kernel(weight.shape), image.shape[1]
        of_image = of_weight = None
        if wants_weight and ctx.parts.of_weight:
            windows = _windows(image, kernel, ctx.stride, ctx.padding)
            by_channel = gradient.permute(0, 2, 3, 1).flatten(0, 2).t()
            of_weight = _map(by_channel @ windows, len(weight), kernel)
        if wants_image and ctx.parts.of_image:
            # at every position of the image, what its part in the outputs around it was multiplied by
            around = (kernel[0] - 1 - ctx.padding[0], kernel[1] - 1 - ctx.padding[1])
            windows = _windows(gradient, kernel, (1, 1), around, turned=True)
            of_image = _map(
                windows @ weight.permute(2, 3, 0, 1).reshape(-1, channels), len(image), tuple(image.shape[2:])
            )
        rest = [wants_image and of_image is None, wants_weight and of_weight is None, False]
        if any(rest):
            options = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, rest)
            left = torch.ops.aten.convolution_backward(gradient, image, weight, *options)
            of_image, of_weight = (left[i] if rest[i] else done for i, done in enumerate((of_image, of_weight)))
        return of_image, of_weight, None, None, None


def _positions(image: torch.Size, weight: torch.Size, stride: Pair, padding: Pair) -> int:
    """Of all images together, in the output; 0 for what the library refuses, which is left to say what is wrong."""
    if len(weight) != 4 or image[1] != weight[1] or min(image[1], *stride) < 1 or min(padding) < 0:
        return 0
    high, wide = _size(image, weight, stride, padding)
    return max(image[0], 0) * max(high, 0) * max(wide, 0)


def _as_products(image: torch.Size, weight: torch.Size, stride: Pair, padding: Pair) -> Parts:
    """Which parts of a convolution are faster as matrix products, in 16 bits."""
    positions = _positions(image, weight, stride, padding)
    if not positions:
        return NONE
    kernel = _kernel(weight)
    # of a larger stride, windows of the gradient would be mostly zeros; more padding than kernel has no windows
    turns = stride == (1, 1) and padding[0] < kernel[0] and padding[1] < kernel[1]
    if kernel == (1, 1) and padding == (0, 0):
        few = positions <= FEW
        return Parts(few, few and turns, few)
    return Parts(
        COPIED * positions <= weight[0],
        COPIED * positions <= weight[1] and turns,
        positions <= COPIED_FOR_WEIGHTS * weight[0],
    )


def _as_products_in_float32(image: torch.Size, weight: torch.Size, stride: Pair, padding: Pair) -> Parts:
    """The same in float32. Without AVX-512 the library's gradient of the weights is slower than theirs for longer."""
    positions = _positions(image, weight, stride, padding)
    few = positions <= COPIED_FOR_WEIGHTS * weight[0] if AVX2 else COPIED * positions <= weight[0]
    return NONE._replace(of_weight=positions > 0 and few)


def _windows(image: Tensor, kernel: Pair, stride: Pair, padding: Pair, *, turned: bool = False) -> Tensor:
    """Map [N, C, H, W] -> [N * positions, kernel height * width * C], what a kernel sees at every position.

    `turned` by half a turn.
    """
    rows = image.permute(0, 2, 3, 1)
    if kernel == (1, 1) and padding == (0, 0):
        return rows[:, :: stride[0], :: stride[1]].flatten(0, 2)
    windows = F.pad(rows, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = windows.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1]).movedim(3, 5)
    return (windows.flip(3, 4) if turned else windows).flatten(3).flatten(0, 2)


def _rows(weight: Tensor) -> Tensor:
    """[D, C, h, w] -> [D, h * w * C], as windows have it."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _map(rows: Tensor, n: int, size: tuple[int, ...]) -> Tensor:
    """[N * H * W, C] or [N, H * W * C] -> map [N, C, H, W], channels last."""
    return rows.view(n, *size, -1).permute(0, 3, 1, 2)


def _size(image: torch.Size, weight: torch.Size, stride: Pair, padding: Pair) -> Pair:
    """Height and width of what comes out."""
    high, wide = ((image[2 + i] + 2 * padding[i] - weight[2 + i]) // stride[i] + 1 for i in (0, 1))
    return high, wide


def _kernel(weight: torch.Size) -> Pair:
    return weight[2], weight[3]


def _pair(given: int | Pair) -> Pair:
    return (given, given) if isinstance(given, int) else (given[0], given[-1])


def _single(x: Tensor) -> bool:
    """Whether this tensor is in float32, on a CPU, and stays so."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _halves(x: Tensor) -> bool:
    """Whether autocast would take this tensor to bfloat16 on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
