"""The full-net trained alone first, then all nets from it: two commands in one, and one folder to go on with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import TINY
from ddnn import recipe as recipes
from ddnn.checkpoint import FULL_NET, RunFolder
from ddnn.errors import RecipeError
from ddnn.full_net_first import full_net_first, trainings

Call = Callable[..., tuple[int, str, str]]
RAMPED = (*TINY, "objective.ramp=[0.5,1.0]")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(tensor.equal(b[name]) for name, tensor in a.items())


def test_it_is_the_two_commands_in_one(ddnn: Call, tmp_path: Path) -> None:
    code, out, err = ddnn("train", *RAMPED, "--full-net-first", "--out", tmp_path / "one")
    assert code == 0, err
    assert out.index("one/full-net") < out.index("resnet8")
    full, nested = tmp_path / "full", tmp_path / "nested"
    assert ddnn("train", *RAMPED, "network.alone=resnet20", "--out", full)[0] == 0
    begun = (f"network.weights={full}", f"objective.teacher={full}", "objective.ramp=[0,0]")
    assert ddnn("train", *TINY, *begun, "--out", nested)[0] == 0
    assert_same_weights(tmp_path / "one" / FULL_NET, full)
    assert_same_weights(tmp_path / "one", nested)
    (tmp_path / "one").rename(tmp_path / "moved")  # it names its part from itself
    assert ddnn("evaluate", tmp_path / "moved")[0] == 0


def test_it_goes_on_wherever_it_was(ddnn: Call, tmp_path: Path) -> None:
    alone, nested = full_net_first(recipes.load("digits", list(TINY)))
    run = RunFolder.create(tmp_path / "run", nested)
    part = RunFolder.create(run.path / FULL_NET, alone)
    assert part.whole == run.whole == run.path
    assert [each.path for each in trainings(run)] == [part.path, run.path]
    assert ddnn("train", "--resume", run.path)[0] == 0
    for each in (part, run):
        assert each.read_json("summary.json") is not None
    assert list(part.read_json("summary.json")["subnets"]) == ["resnet20"]  # type: ignore[index]
    assert set(run.metrics()[0]["terms"]) == {f"resnet{n}/{t}" for n in (8, 14, 20) for t in ("ce", "kl", "attention")}


@pytest.mark.parametrize("given", ["network.alone=resnet8", "network.weights=some.pt", "objective.teacher=runs/full"])
def test_another_beginning_is_refused(given: str) -> None:
    with pytest.raises(RecipeError, match=r"and a full-net that is trained first exclude each other"):
        full_net_first(recipes.load("digits", [given]))


def test_it_is_no_way_to_go_on(ddnn: Call, tmp_path: Path) -> None:
    code, _, err = ddnn("train", "--resume", tmp_path, "--full-net-first")
    assert code == 2
    assert "--full-net-first" in err
