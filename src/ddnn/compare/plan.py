"""Which trainings a comparison consists of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddnn.errors import DDNNError, RecipeError
from ddnn.recipe import Recipe, by_itself, changed, largest


@dataclass(frozen=True)
class Job:
    """One training of a comparison."""

    name: str
    """Of its folder in `runs/`."""
    method: str
    seed: int
    recipe: Recipe
    needs: str | None = None
    """The job that has to be finished before."""


Trainings = list[tuple[str, Recipe, str | None]]
"""Of one method and seed: ending of the name, recipe, name of the training that has to be finished before."""
Method = Callable[[Recipe, list[str], int], Trainings]
"""Called with the recipe, the names of the nets (the full-net last) and the seed's number."""


def _joint(**objective: Any) -> Method:
    """A method that is one training of the whole DDNN."""
    return lambda recipe, nets, seed: [("", changed(recipe, objective=objective), None)]


def alone(recipe: Recipe, net: str) -> Recipe:
    """The recipe of one net by itself: its objective is cross-entropy."""
    return changed(by_itself(recipe), network={"alone": net}, objective={**_for_all(recipe), "teacher": None})


def _for_all(recipe: Recipe) -> dict[str, Any]:
    """The weights of its objective where no net is a sub-net of another: of what it gives by name, the largest."""
    given = recipe.objective
    return {"kl": largest(given.kl), "attention": largest(given.attention), "subnet_weight": 1.0}


def _by(trained: Path, recipe: Recipe) -> dict[str, Any]:
    """The objective where a finished network teaches: all nets are its students alike, from the first step on."""
    return {**_for_all(recipe), "teacher": trained, "labels": "all", "ramp": (0.0, 0.0)}


def from_trained(recipe: Recipe, trained: Path) -> Recipe:
    """The recipe in which all nets start from a trained full-net and train for as many epochs as a net alone.

    A frozen copy of that full-net teaches every net, the full-net included. `trained` is the folder of its run,
    absolute or as seen from the new run's. It knows enough to teach from the first step on, so there is no `ramp`, and
    as a student it weighs as much as any other net.
    """
    network = {"weights": trained, "pretrained": False, "fresh_classifier": False}
    return changed(by_itself(recipe), network=network, objective=_by(trained, recipe))


def _alone(recipe: Recipe, nets: list[str], seed: int) -> Trainings:
    return [(f"-{net}", alone(recipe, net), None) for net in nets]


def _full_net(nets: list[str], seed: int) -> tuple[str, Path]:
    """The training of the full-net alone: its name, and its folder as seen from another training's."""
    name = f"alone-{nets[-1]}-seed{seed}"
    return name, Path("..") / name


def _two_model_kd(recipe: Recipe, nets: list[str], seed: int) -> Trainings:
    needed, teacher = _full_net(nets, seed)
    return [(f"-{net}", changed(alone(recipe, net), objective=_by(teacher, recipe)), needed) for net in nets]


def _pretrained(recipe: Recipe, nets: list[str], seed: int) -> Trainings:
    needed, trained = _full_net(nets, seed)
    return [("", from_trained(recipe, trained), needed)]


METHODS: dict[str, Method] = {
    "ekd": _joint(),
    "alone": _alone,
    "joint": _joint(teacher=None, labels="all", kl=0.0, attention=0.0),
    "kl": _joint(attention=0.0),
    "attention": _joint(kl=0.0),
    "two-model-kd": _two_model_kd,
    "ekd-pretrained": _pretrained,
    "adaptive-depth": _joint(teacher=None, labels="full-net", kl=1.0, attention=0.0, temperature=1.0, ramp=(0.0, 0.0)),
}
"""What each method makes of the recipe.

`ekd` is the recipe itself; `alone` trains every depth by itself; `joint` has shared weights and cross-entropy only;
`kl` and `attention` leave one of the two terms of distillation; `adaptive-depth` has the objective of adaptive-depth
networks (NeurIPS 2024): the full-net learns from labels, sub-nets from its posteriors only, at temperature 1. There
only the smallest sub-net is trained; here every sub-net is, since each has norms of its own.

`two-model-kd` trains every depth with the full-net of `alone` as its teacher, by the same terms from the beginning on,
since that teacher is finished; of weights that the recipe gives by name it takes the largest. `ekd-pretrained` goes
beyond the paper: all nets begin with the full-net of `alone` and are taught likewise by it as it was, itself too, for
as many epochs as it was trained for.
"""


def plan(recipe: Recipe, methods: Iterable[str], seeds: int, nets: list[str]) -> list[Job]:
    """All trainings, seed by seed, so that a comparison cut short has whole seeds; teachers before their students."""
    jobs: list[Job] = []
    for seed in range(seeds):
        seeded = changed(recipe, train={"seed": recipe.train.seed + seed})
        found = [
            Job(f"{method}{ending}-seed{seed}", method, seed, theirs, needs)
            for method in _with_prerequisites(recipe, methods, nets)
            for ending, theirs, needs in METHODS[method](seeded, nets, seed)
        ]
        jobs += sorted(found, key=lambda job: job.needs is not None)
    return jobs


def worthwhile(recipe: Recipe, nets: list[str], check: Callable[[Recipe, str], None]) -> tuple[list[str], list[str]]:
    """The methods that this recipe has, and a sentence about each other: it is an earlier one again, or can't be.

    `check` raises `DDNNError` where a recipe can't be; it gets the recipe and the name of its method.
    """
    kept: dict[str, Trainings] = {}
    notes = []
    for method, make in METHODS.items():
        trainings = make(recipe, nets, 0)
        twin = next((other for other, theirs in kept.items() if theirs == trainings), None)
        if twin is not None:
            notes.append(f"{method} is left out, as with this recipe it is the same as {twin}")
            continue
        try:
            for _, theirs, _ in trainings:
                check(theirs, method)
        except DDNNError as error:
            notes.append(f"{method} is left out, as this recipe can't have it: {' '.join(str(error).split())}")
        else:
            kept[method] = trainings
    return list(kept), notes


def _with_prerequisites(recipe: Recipe, methods: Iterable[str], nets: list[str]) -> list[str]:
    wanted = list(methods)
    unknown = [method for method in wanted if method not in METHODS]
    if unknown:
        raise RecipeError(f"no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    if "alone" not in wanted and any(job[-1] for method in wanted for job in METHODS[method](recipe, nets, 0)):
        wanted.append("alone")  # where their full-nets come from
    return [method for method in METHODS if method in wanted]
