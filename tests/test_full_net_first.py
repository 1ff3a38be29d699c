"""The full-net by itself first, then its sub-nets beside it: two commands in one, and one folder to go on with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import TINY
from ddnn import recipe as recipes
from ddnn.checkpoint import RunFolder
from ddnn.errors import RecipeError, RunError
from ddnn.full_net_first import phases, trainings
from ddnn.recipe import FULL_NET
from ddnn.trainer import Silent, train

Call = Callable[..., tuple[int, str, str]]
RAMPED = (*TINY, "objective.ramp=[0.5,1.0]")
FIRST = ("train.epochs=2", "train.nested_epochs=1", "optim.nested_lr=0.02")
OWN_TEACHER = f"objective.teacher={FULL_NET}"


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(tensor.equal(b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("teacher", [(), (OWN_TEACHER,)], ids=["as it is", "as it was"])
def test_it_is_the_two_commands_in_one(ddnn: Call, tmp_path: Path, teacher: tuple[str, ...]) -> None:
    code, out, err = ddnn("train", *RAMPED, *FIRST, *teacher, "--out", tmp_path / "one")
    assert code == 0, err
    assert out.index("one/full-net") < out.index("resnet8")
    full, nested = tmp_path / "full", tmp_path / "nested"
    assert ddnn("train", *RAMPED, "train.epochs=2", "network.alone=resnet20", "--out", full)[0] == 0
    begun = [
        "train.epochs=1",
        "optim.lr=0.02",
        f"network.weights={full}",
        *([f"objective.teacher={full}"] if teacher else []),
    ]
    assert ddnn("train", *TINY, *begun, "--out", nested)[0] == 0
    assert_same_weights(tmp_path / "one" / FULL_NET, full)
    assert_same_weights(tmp_path / "one", nested)
    (tmp_path / "one").rename(tmp_path / "moved")  # it names its part from itself
    assert ddnn("evaluate", tmp_path / "moved")[0] == 0


def test_it_goes_on_wherever_it_was(ddnn: Call, tmp_path: Path) -> None:
    first, last = phases(recipes.load("digits", [*TINY, *FIRST, OWN_TEACHER]))
    run = RunFolder.create(tmp_path / "run", last)
    part = RunFolder.create(run.path / FULL_NET, first)
    assert part.whole == run.whole == run.path
    assert [each.path for each in trainings(run)] == [part.path, run.path]
    assert ddnn("train", "--resume", run.path)[0] == 0
    for each in (part, run):
        assert each.read_json("summary.json") is not None
    assert list(part.read_json("summary.json")["subnets"]) == ["resnet20"]  # type: ignore[index]
    assert [len(each.metrics()) for each in (part, run)] == [2, 1]
    assert set(run.metrics()[0]["terms"]) == {f"resnet{n}/{t}" for n in (8, 14, 20) for t in ("ce", "kl", "attention")}


def test_without_it_all_nets_begin_together() -> None:
    assert phases(recipes.load("digits")) == [recipes.load("digits")]


@pytest.mark.parametrize(("given", "kept"), [((), ()), ((OWN_TEACHER,), ()), (("objective.teacher=x",),) * 2])
def test_nothing_joins_a_net_alone(given: tuple[str, ...], kept: tuple[str, ...]) -> None:
    one = "network.alone=resnet8"
    assert phases(recipes.load("digits", [one, *FIRST, *given])) == [
        recipes.load("digits", [one, "train.epochs=2", *kept])
    ]


def test_a_warm_up_must_fit_into_both() -> None:
    with pytest.raises(RecipeError, match=r"warmup_epochs=3 must be below train\.nested_epochs=3"):
        recipes.load("digits", ["schedule.warmup_epochs=3", "train.nested_epochs=3"])


def test_one_training_is_not_two(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", recipes.load("digits", [*TINY, *FIRST]))
    with pytest.raises(RunError, match=r"train\.nested_epochs, which is two trainings"):
        train(run, Silent())
