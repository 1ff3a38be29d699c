"""The anatomy of a network that no family lists: its stages named by the user, or found by its structure."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError, first_line
from ddnn.families.anatomy import Stage, named_stages
from ddnn.families.discover import Behaviour, behaviour, example_for, find_stages
from ddnn.families.family import Anatomy, Axes, Family
from ddnn.families.split import IndivisibleError
from ddnn.proof import described

HOW_TO_NAME = (
    "name them, such as ddnn.nest(net, {...}, stages=['layer1', 'features[2:6]', 'block1..block3', 'stages.*.blocks']) "
    "or network.stages in a recipe"
)


def examine(
    net: nn.Module, stages: Sequence[str] | None, example: Tensor | None, like: Family | None = None
) -> tuple[Anatomy, Tensor]:
    """Where the network keeps its stages, and images that it takes. What else there is to know is as in `like`.

    Raises `NestingError` if no stages are found or if those named are none.
    """
    example = images_for(net, example)
    try:
        did = behaviour(net, example)
    except Exception as error:  # whatever a forward may raise
        raise NestingError(
            f"{type(net).__name__} can't run on images {list(example.shape)}: {first_line(error)}; give some that it "
            "takes as example=..."
        ) from error
    if not isinstance(did.result, Tensor) or did.result.ndim != 2:
        raise NestingError(f"{type(net).__name__} gives {described(did.result)}, not logits [N, classes]")
    found = find_stages(net, did) if stages is None else list(stages)
    if not found:
        raise NestingError(
            f"cannot find the stages of {type(net).__name__}: no modules of one class follow each other so that the "
            f"later ones keep the shape of what they take; {HOW_TO_NAME}"
        )
    kept = named_stages(net, found)
    if stages is not None:
        _check_named(net, kept, did)
    family = Family(
        f"{type(net).__name__}, stages " + ("found by structure" if stages is None else "named by hand"),
        matches=_never,
        stages=tuple(found),
        axes=_axes(kept, did, example),
    )
    if like is not None:
        family = replace(like, name=family.name, matches=_never, stages=family.stages)
    return _taken_apart(net, kept, family, did, dropping=stages is None), example


def images_for(net: nn.Module, example: Tensor | None = None) -> Tensor:
    """A real example for the network, where one is not given."""
    parameter = next(net.parameters(), torch.empty(0))
    if example is None:
        example = torch.randn(example_for(net).shape, generator=torch.Generator().manual_seed(0))
    elif example.ndim != 4:
        raise NestingError(f"example must hold images [N, C, H, W], not {list(example.shape)}")
    return example.to(parameter.device, parameter.dtype)


def _taken_apart(
    net: nn.Module, stages: tuple[Stage, ...], family: Family, did: Behaviour, *, dropping: bool
) -> Anatomy:
    """With `dropping`, without the stages that lie in a branch, beside which something else goes on."""
    left = stages
    while True:
        try:
            return replace(family, stages=tuple(stage.name for stage in left)).taken_apart(net, left)
        except IndivisibleError as indivisible:
            units = [stage for stage in left for _ in stage.blocks]
            if dropping and indivisible.after is not None and len(left) > 1:
                left = tuple(stage for stage in left if stage is not units[indivisible.after])
                continue
            last = max(did.order, key=lambda name: did.order[name])
            return replace(family, whole=str(indivisible), classifier=(last,)).taken_apart(net, stages)


def _check_named(net: nn.Module, stages: Sequence[Stage], did: Behaviour) -> None:
    kind = type(net).__name__
    for stage in stages:
        for b, block in enumerate(stage.blocks):
            for module in block:
                if did.times.get(module, 0) != 1:
                    times = f"{did.times[module]} times" if module in did.times else "never"
                    raise NestingError(
                        f"stage {stage.name!r}: the forward of {kind} runs {module} {times}; a block must run once"
                    )
            first, last = did.calls.get(block[0]), did.calls.get(block[-1])
            if b and first and last and first.takes != last.gives:
                raise NestingError(
                    f"stage {stage.name!r}: its blocks differ in width or resolution: {block[-1]} takes "
                    f"{list(first.takes[1:])} and gives {list(last.gives[1:])}, so it can't be left out; only the "
                    "first block of a stage may change the shape"
                )


def _axes(stages: Sequence[Stage], did: Behaviour, example: Tensor) -> Axes:
    """Whether the maps have their channels first or last: where the image's proportions are."""
    aspect = example.shape[2] / example.shape[3]
    first = last = 0.0
    for stage in stages:
        call = did.calls.get(stage.blocks[-1][-1])
        if call is not None and len(call.gives) == 4:
            _, a, b, c = call.gives
            first += abs(b / c / aspect - 1)
            last += abs(a / b / aspect - 1)
    return "NHWC" if last < first else "NCHW"


def _never(net: nn.Module) -> bool:
    return False
