"""`config.json`: what has to be known of a model besides its weights."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from ddnn.data.augment import for_evaluation, normalise
from ddnn.errors import HubError, first_mistake
from ddnn.picture import rgb
from ddnn.policies import HeadPolicy, NormPolicy
from ddnn.recipe import Option
from ddnn.version import __version__

FORMAT = 1

Count = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=8192)]
# No part of it may be a path, an address or another library's way to fetch something.
NetworkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$", max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Preprocessing(_Part):
    """How an image becomes the network's input, as it did in training's evaluation."""

    size: Side
    """Side in pixels of the square images that the network is given."""
    resize: Side
    """Pixels that the shorter side is resized to before the centre crop."""
    mean: tuple[float, float, float]
    """By channel, of pixels in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    def __call__(self, image: Image.Image) -> Tensor:
        """An image -> a batch of it, float32 [1, 3, size, size]."""
        pixels: Tensor = for_evaluation(self.size, self.resize)(rgb(image.copy))
        return normalise(pixels[None], self.mean, self.std)


class Network(_Part):
    """The full-net, or a larger one it can be cut from, as a recipe would name it."""

    name: NetworkName
    width: Annotated[int, Field(ge=1, le=8192)] = 16
    """Channels of the first stage; CIFAR ResNets only."""
    options: dict[str, Option] = {}
    """Given to the library's function that makes the network."""
    stages: tuple[str, ...] | None = None
    """Names of the stages, where the network's own division was not taken."""

    @model_validator(mode="after")
    def _fetches_nothing(self) -> Self:
        for key in self.options:
            if key.startswith(("pretrained", "checkpoint", "cache", "weights")):
                raise ValueError(f"the option {key!r} would fetch or load something else than these weights")
        return self


class Config(_Part):
    """The content of `config.json`."""

    ddnn: str = __version__
    """The version that wrote it; that the key is there tells ddnn's models from others."""
    format: int = FORMAT
    network: Network | None
    """How the full-net is built; None: it was made by code."""
    stages: tuple[str, ...]
    """Names of the stages."""
    num_classes: Count
    depths: Annotated[dict[str, tuple[Count, ...]], Field(min_length=1)]
    """Blocks kept per stage by name of the net, the full-net last."""
    norm: NormPolicy
    head: HeadPolicy
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names of classes for {self.num_classes} classes")
        for name, depths in self.depths.items():
            if len(depths) != len(self.stages):
                raise ValueError(f"net {name} has {len(depths)} depths for {len(self.stages)} stages")
        return self

    def to_json(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> Config:
    """The config of a folder that `save_pretrained` wrote; `HubError` says what else is there instead."""
    path = folder / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HubError(f"{folder} holds no model: it has no config.json") from None
    except OSError as error:
        raise HubError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise HubError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(content, dict) or "ddnn" not in content:
        raise HubError(f"{folder} holds no model of ddnn{_whose(folder, content)}")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise HubError(
            f"{path} is of format {content['format']}, written by ddnn {content['ddnn']}; this ddnn reads up to "
            f"format {FORMAT}, so install a newer one"
        )
    return checked(content, str(path))


def checked(content: dict[str, Any], where: str) -> Config:
    """A config from its fields; `HubError` names the first thing wrong with them."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise HubError(f"{where} cannot be used: {first_mistake(error.errors())}") from None


def _whose(folder: Path, content: Any) -> str:
    if isinstance(content, dict) and isinstance(content.get("architecture"), str):
        return (
            f" but a network of timm, {content['architecture']}; load it with "
            f"timm.create_model('local-dir:{folder}', pretrained=True)"
        )
    if isinstance(content, dict) and isinstance(content.get("model_type"), str):
        return f" but one of transformers, {content['model_type']}"
    return ": its config.json has no key 'ddnn'"
