"""The full-net first: trained by itself, and only then joined by its sub-nets, which start from its weights.

Two trainings, in one run folder or in a comparison. A full-net that learns beside its sub-nets has little to teach them
at first, and pays for what they need of the shared weights; the paper does not say how its training begins.
"""

from pathlib import Path
from typing import Any

from ddnn.build import full_name
from ddnn.checkpoint import RunFolder
from ddnn.recipe import FULL_NET, Recipe, changed


def alone(recipe: Recipe, net: str) -> Recipe:
    """The recipe of one net by itself, for `epochs`: its objective is cross-entropy."""
    optim, train = {"nested_lr": None}, {"nested_epochs": None}
    return changed(recipe, network={"alone": net}, objective={"teacher": None}, optim=optim, train=train)


def nested(recipe: Recipe, trained: Path) -> Recipe:
    """The recipe of all nets from a trained full-net on, for `nested_epochs`.

    `trained` is the folder of its run, absolute or as seen from the new run's. The full-net knows enough to teach from
    the first step on, so there is no `ramp`. With `objective.teacher` set to `full-net` it is the full-net as it was
    that teaches, all nets, at the price of its forward.
    """
    network: dict[str, Any] = {"weights": trained, "pretrained": False, "fresh_classifier": False}
    objective: dict[str, Any] = {"ramp": (0.0, 0.0)}
    if recipe.objective.teacher == Path(FULL_NET):
        objective["teacher"] = trained
    optim = {"lr": recipe.optim.nested_lr or recipe.optim.lr, "nested_lr": None}
    epochs = {"epochs": recipe.train.nested_epochs or recipe.train.epochs, "nested_epochs": None}
    return changed(recipe, network=network, objective=objective, optim=optim, train=epochs)


def phases(recipe: Recipe) -> list[Recipe]:
    """The recipes of the full-net by itself and of all nets after it, or the one of all nets that begin together.

    With `network.alone` there is one too, as nothing joins that net.
    """
    if recipe.train.nested_epochs is None:
        return [recipe]
    full = alone(recipe, recipe.network.alone or full_name(recipe.network.name))
    if recipe.network.alone is None:
        return [full, nested(recipe, Path(FULL_NET))]
    teacher = recipe.objective.teacher
    return [full if teacher == Path(FULL_NET) else changed(full, objective={"teacher": teacher})]


def trainings(run: RunFolder) -> list[RunFolder]:
    """The run in this folder and, before it, the one of its full-net by itself where that is trained first."""
    first = run.recipe.network.weights == Path(FULL_NET)
    return [RunFolder.open(run.path / FULL_NET), run] if first else [run]
