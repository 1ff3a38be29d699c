"""Two trainings in one run folder: the full-net alone, then all nets, which start from it and are taught by it.

The paper's full-net learns beside its sub-nets and has little to teach them at first. This goes beyond the paper.
"""

from pathlib import Path

from ddnn.build import full_name
from ddnn.checkpoint import FULL_NET, RunFolder
from ddnn.errors import RecipeError
from ddnn.recipe import Recipe, changed


def taught_by(recipe: Recipe, trained: Path) -> Recipe:
    """The recipe for nets that start from a trained full-net and are taught by it as it was, the full-net too.

    `trained` is the folder of its run, absolute or as seen from the new run's. As in any training by EKD, each net
    learns from labels, by the KL term and by the attention term in every iteration. But the teacher is finished: it
    teaches from the first step on (no `ramp`), and its forward comes on top.
    """
    fresh = recipe.model_copy(update={"network": recipe.network.unweighted()})
    return changed(fresh, network={"weights": trained}, objective={"teacher": trained, "ramp": (0.0, 0.0)})


def full_net_first(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """The recipes of the full-net alone and of all nets after it; `RecipeError` where the recipe says otherwise."""
    for key, given in (
        ("network.alone", recipe.network.alone),
        ("network.weights", recipe.network.weights),
        ("objective.teacher", recipe.objective.teacher),
    ):
        if given is not None:
            raise RecipeError(f"{key}={given} and a full-net that is trained first exclude each other")
    alone = changed(recipe, network={"alone": full_name(recipe.network.name)})
    return alone, taught_by(recipe, Path(FULL_NET))


def trainings(run: RunFolder) -> list[RunFolder]:
    """The run in this folder and, before it, the one of its full-net alone where that is trained first."""
    first = run.recipe.network.weights == Path(FULL_NET)
    return [RunFolder.open(run.path / FULL_NET), run] if first else [run]
