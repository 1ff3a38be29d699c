"""Try on one batch whether nets can run, and whether taking their forward apart changed anything."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError, first_line

Function = Callable[[Tensor], Tensor]


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, without gradients; afterwards each as it was."""
    were = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        with torch.no_grad():
            yield
    finally:
        for module, was in were:
            module.training = was


def logits_of(nets: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What every net makes of the images by its own forward; `NestingError` if one can't run or gives no logits."""
    logits: dict[str, Tensor] = {}
    for name, net in nets.items():
        try:
            result = net(x)
        except Exception as error:  # whatever a forward may raise when a block that it counts on is gone
            raise NestingError(f"net {name} can't run on images {list(x.shape)}: {first_line(error)}") from error
        if not isinstance(result, Tensor) or result.ndim != 2:
            raise NestingError(f"net {name} gives {described(result)}, not logits [N, classes]")
        logits[name] = result
    return logits


def overwrites(stem: Function, path: Sequence[Function], head: Function, x: Tensor) -> bool:
    """Whether a block or the head changes what it is given, in place."""
    given = [(x, x._version)]
    feature = stem(x)
    for block in path:
        given.append((feature, feature._version))
        feature = block(feature)
    given.append((feature, feature._version))
    head(feature)
    return any(tensor._version != version for tensor, version in given)


def described(result: object) -> str:
    """What a forward returned, in words."""
    if isinstance(result, Tensor):
        return f"a tensor {list(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"{len(result)} values ({', '.join(type(value).__name__ for value in result)})"
    return f"a {type(result).__name__}"
