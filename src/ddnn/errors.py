"""Every mistake a user can make ends in one of these: one sentence that says what, where, and what is allowed.

They are ``ValueError``; the command line prints their text and exits, without a traceback. A broken
invariant of our own is an ``assert``, never one of these.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class DDNNError(ValueError):
    """Base of every error that speaks to the user."""


class RecipeError(DDNNError):
    """A recipe or an override cannot be used."""


class DataError(DDNNError):
    """A data set cannot be found, read or split."""


class NestingError(DDNNError):
    """The networks asked for do not nest in the full-net."""


class BundleError(DDNNError):
    """A bundle cannot be written, read or trusted."""


class RequestError(DDNNError):
    """A bundle is asked for what it does not have, or given what is no image."""


class BudgetError(DDNNError):
    """No depth of a bundle is fast, small or accurate enough for what is wanted; the text says by how much."""


class OverloadError(DDNNError):
    """A service has more to do than it can answer in time; another moment it may have time."""


class RunError(DDNNError):
    """A run folder or a checkpoint cannot be used, or a training had to stop."""


class Preempted(RunError):  # noqa: N818  # what happened is no mistake
    """The training was asked to end, and can go on."""


class ExportError(DDNNError):
    """A network cannot be exported, or what was exported does not compute what the network computes."""


class HubError(DDNNError):
    """What the Hugging Face hub keeps of a model, in a folder or a repository, can't be written, read or trusted."""


def first_mistake(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors: where it is, and what is wrong there."""
    place = ".".join(map(str, errors[0]["loc"]))
    what = "is missing" if errors[0]["type"] == "missing" else errors[0]["msg"].removeprefix("Value error, ")
    return f"{place}: {what}" if place else what


def first_line(error: BaseException, *, kind: bool = True) -> str:
    """The first line of somebody else's error, with its kind if wanted; its kind alone where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if kind else lines[0].rstrip()
