"""The fair fight: one recipe, one code path; resumable, and what it reports is what the runs say."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, Quiet, trainings_of
from ddnn import recipe as recipes
from ddnn.checkpoint import RunFolder
from ddnn.compare import METHODS, Job, Local, compare, engine, plan, seconds_left
from ddnn.errors import DataError, RecipeError, RunError
from ddnn.evaluate import macs
from ddnn.recipe import Recipe
from ddnn.trained import load_trained
from ddnn.trainer import train

NETS = ["resnet8", "resnet14", "resnet20"]


class Silent:
    """Watches in silence and remembers which trainings ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.notes: list[str] = []

    def comparison(self, running: list[str], done: int, total: int, seconds_left: float | None) -> None:
        pass

    def finished(self, name: str, summary: dict[str, Any]) -> None:
        self.ended.append(name)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def tiny_recipe(*overrides: str) -> Recipe:
    return recipes.load("digits", [*TINY, "train.epochs=1", *overrides])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings run here instead of in processes of their own, which take seconds to start."""

    def run(path: Path, recipe: Recipe, keep_on: Callable[[], bool]) -> int:
        train(RunFolder.open(path) if path.exists() else RunFolder.create(path, recipe), Quiet())
        return 0

    monkeypatch.setattr(engine, "train_run", run)
    monkeypatch.setattr(engine, "ThreadPoolExecutor", AtOnce)


class AtOnce:
    """Threads are for waiting; networks, which torch takes apart by changing `Module` for a moment, bear one only."""

    def __init__(self, workers: int) -> None:
        pass

    def submit(self, call: Callable[..., int], *arguments: object) -> Future[int]:
        future: Future[int] = Future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


def test_methods_differ_in_nothing_but_what_they_say() -> None:
    recipe = tiny_recipe("train.seed=5", "objective.ramp=[0.2,0.6]")
    base = recipe.model_dump()
    jobs = {job.name: job for job in plan(recipe, METHODS, 2, NETS)}
    assert len(jobs) == 2 * (6 + 2 * 3)
    changes = {}
    for name, job in jobs.items():
        theirs = job.recipe.model_dump()
        changes[name] = {
            f"{section}.{key}": value
            for section, fields in theirs.items()
            for key, value in fields.items()
            if value != base[section][key]
        }
    assert changes["ekd-seed0"] == {}
    assert changes["ekd-seed1"] == {"train.seed": 6}
    assert changes["joint-seed0"] == {"objective.kl": 0.0, "objective.attention": 0.0}
    assert changes["kl-seed0"] == {"objective.attention": 0.0}
    assert changes["attention-seed0"] == {"objective.kl": 0.0}
    assert changes["alone-resnet8-seed0"] == {"network.alone": "resnet8"}
    assert changes["adaptive-depth-seed0"] == {
        "objective.labels": "full-net",
        "objective.attention": 0.0,
        "objective.temperature": 1.0,
        "objective.ramp": (0.0, 0.0),
    }
    assert changes["two-model-kd-resnet14-seed0"] == {
        "network.alone": "resnet14",
        "objective.ramp": (0.0, 0.0),
        "objective.teacher": Path("../alone-resnet20-seed0"),  # wherever the comparison is moved
    }
    assert changes["ekd-pretrained-seed1"] == {
        "train.seed": 6,
        "network.weights": Path("../alone-resnet20-seed1"),
        "objective.ramp": (0.0, 0.0),
        "objective.teacher": Path("../alone-resnet20-seed1"),
    }


def test_a_finished_network_teaches_all_nets_alike() -> None:
    recipe = tiny_recipe(
        "objective.kl={resnet8=2, resnet14=0.5}", "objective.attention.resnet8=0", "objective.attention.resnet14=3"
    )
    jobs = {job.name: job.recipe.objective for job in plan(recipe, METHODS, 1, NETS)}
    assert jobs["ekd-seed0"].kl == {"resnet8": 2, "resnet14": 0.5}
    assert jobs["kl-seed0"].kl == {"resnet8": 2, "resnet14": 0.5}
    for name in (
        "alone-resnet8-seed0",
        "two-model-kd-resnet14-seed0",
        "two-model-kd-resnet20-seed0",
        "ekd-pretrained-seed0",
    ):
        assert (jobs[name].kl, jobs[name].attention) == (2, 3)
    assert (jobs["adaptive-depth-seed0"].kl, jobs["adaptive-depth-seed0"].attention) == (1, 0)


def test_nets_alone_have_epochs_of_their_own() -> None:
    recipe = tiny_recipe("train.epochs=5", "train.full_net_share=0.4", "train.alone_share=0.6")
    jobs = {job.name.removesuffix("-seed0"): job.recipe for job in plan(recipe, METHODS, 1, NETS)}
    together = {"ekd", "joint", "kl", "attention", "adaptive-depth"}
    for name, theirs in jobs.items():
        train = theirs.train
        assert (train.epochs, train.full_net_epochs) == ((5, 2) if name in together else (3, 0)), name
    for name in together:
        assert jobs[name].model_copy(update={"objective": None}) == recipe.model_copy(update={"objective": None})
    # what does not have all nets with this recipe's schedule is as if there were no other epochs
    plain = {job.name: job.recipe for job in plan(tiny_recipe("train.epochs=3"), METHODS, 1, NETS)}
    for name in jobs.keys() - together:
        assert jobs[name] == plain[f"{name}-seed0"]


def test_teachers_come_before_their_students() -> None:
    for method in ("two-model-kd", "ekd-pretrained"):
        jobs = plan(tiny_recipe(), [method], 1, NETS)
        names = [job.name for job in jobs]
        assert names[:3] == [f"alone-{net}-seed0" for net in NETS]
        assert all(job.needs and names.index(job.needs) < names.index(job.name) for job in jobs[3:])
    with pytest.raises(RecipeError, match="no method 'magic'; there are: ekd, alone, joint"):
        plan(tiny_recipe(), ["magic"], 1, NETS)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.slow
def test_the_epochs_of_the_full_net_cost_less(tmp_path: Path) -> None:
    recipe = tiny_recipe("train.epochs=3", "train.full_net_share=0.7", "train.alone_share=0.7")
    content = json.loads(compare(tmp_path, recipe, ["ekd", "alone"], 1, Silent()).read_text())
    assert content["complete"]
    assert [content[key] for key in ("epochs", "full_net_epochs", "alone_epochs")] == [3, 2, 2]
    net, _ = load_trained(RunFolder.open(tmp_path / "runs" / "ekd-seed0"))
    cost = {name: macs(net.nets[name], 8) for name in NETS}
    of = {name: method["macs_per_step"] / recipe.train.batch_size for name, method in content["methods"].items()}
    assert of["ekd"] == pytest.approx(3 * (2 * cost["resnet20"] + macs(net, 8)) / 2)
    assert of["alone"] == pytest.approx(3 * sum(cost.values()))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.slow
def test_a_whole_comparison(tmp_path: Path) -> None:
    folder, recipe, watcher = tmp_path / "fair", tiny_recipe(), Silent()
    path = compare(folder, recipe, list(METHODS), 1, watcher)
    assert path == folder / "comparison.json"
    content = json.loads(path.read_text())
    assert content["complete"]
    assert list(content["methods"]) == list(METHODS)
    assert list(content["nets"]) == NETS
    for method, row in content["methods"].items():
        assert set(row) == {"subnets", "seconds", "cpu_seconds", "macs_per_step", "peak_memory_mb", "runs"}
        for net in NETS:
            [top1] = row["subnets"][net]
            runs = [RunFolder.open(folder / "runs" / name).read_json("summary.json") for name in row["runs"]["0"]]
            assert top1 in [run["subnets"][net]["top1"] for run in runs if net in run["subnets"]]
        assert row["seconds"] > 0, method
        assert row["cpu_seconds"] > 0, method

    # costs, written out: three forwards' worth of MACs for each network trained, and the teacher's part
    net, _ = load_trained(RunFolder.open(folder / "runs" / "ekd-seed0"))
    alone = {name: macs(sub, 8) for name, sub in net.nets.items()}
    full = alone["resnet20"]
    costs = {method: row["macs_per_step"] / recipe.train.batch_size for method, row in content["methods"].items()}
    assert costs["alone"] == 3 * sum(alone.values())
    assert costs["ekd"] == costs["joint"] == 3 * macs(net, 8)
    assert costs["ekd-pretrained"] == 3 * full + 3 * macs(net, 8) + full
    assert costs["two-model-kd"] == 3 * full + 3 * (sum(alone.values()) + full)

    # the same training by hand gives the same weights
    by_hand = RunFolder.create(tmp_path / "by-hand", recipe)
    train(by_hand, Quiet())
    theirs = load_file(folder / "runs" / "ekd-seed0" / "model.safetensors")
    assert all(torch.equal(t, theirs[n]) for n, t in load_file(by_hand.path / "model.safetensors").items())

    # what each learns from
    terms = {
        name: set(RunFolder.open(folder / "runs" / f"{name}-seed0").metrics()[0]["terms"])
        for name in ("adaptive-depth", "joint", "alone-resnet8", "two-model-kd-resnet8", "ekd-pretrained")
    }
    assert terms["adaptive-depth"] == {"resnet20/ce", "resnet8/kl", "resnet14/kl"}
    assert terms["joint"] == {"resnet20/ce", "resnet8/ce", "resnet14/ce"}
    assert terms["alone-resnet8"] == {"resnet8/ce"}
    assert terms["ekd-pretrained"] == {f"{net}/{term}" for net in NETS for term in ("ce", "kl", "attention")}
    assert terms["two-model-kd-resnet8"] == {"resnet8/ce", "resnet8/kl", "resnet8/attention"}

    # asked again it trains nothing; asked for another seed, only that
    again = Silent()
    compare(folder, recipe, list(METHODS), 1, again)
    assert again.ended == []
    compare(folder, recipe, ["ekd"], 2, again)
    assert again.ended == ["ekd-seed1"]

    # and the result still has all that is there, whatever was asked for last
    for methods, seeds in ((["ekd"], 2), (["joint"], 1)):
        compare(folder, recipe, methods, seeds, again)
        rows = json.loads(path.read_text())["methods"]
        assert list(rows) == list(METHODS)
        assert None not in rows["ekd"]["subnets"]["resnet8"]
        for method in set(METHODS) - {"ekd"}:
            assert rows[method]["subnets"]["resnet8"] == [content["methods"][method]["subnets"]["resnet8"][0], None]


@pytest.mark.usefixtures("in_this_process")
def test_it_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = engine.train_run, []

    def dies(path: Path, recipe: Recipe, keep_on: Callable[[], bool]) -> int:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, recipe, keep_on)

    monkeypatch.setattr(engine, "train_run", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "fair", tiny_recipe(), ["ekd", "alone"], 1, Silent())
    content = json.loads((tmp_path / "fair" / "comparison.json").read_text())
    assert not content["complete"]
    assert content["methods"]["alone"]["subnets"]["resnet8"][0] is not None
    assert content["methods"]["alone"]["subnets"]["resnet20"] == [None]
    assert content["methods"]["alone"]["seconds"] is None
    watcher = Silent()
    compare(tmp_path / "fair", tiny_recipe(), ["ekd", "alone"], 1, watcher)
    assert watcher.ended == ["alone-resnet14-seed0", "alone-resnet20-seed0"]


@pytest.mark.usefixtures("in_this_process")
def test_a_training_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.train_run

    def fails(path: Path, recipe: Recipe, keep_on: Callable[[], bool]) -> int:
        if path.name != "alone-resnet20-seed0":
            return real(path, recipe, keep_on)
        path.mkdir(parents=True)
        (path / "log.txt").write_text("epoch 1\nerror: the disk is full\n\n")
        return 1

    monkeypatch.setattr(engine, "train_run", fails)
    watcher = Silent()
    with pytest.raises(
        RunError, match=r"4 of 6 trainings failed.*alone-resnet20-seed0 \(see .*log.txt\); two-model.*full\. The"
    ):
        compare(tmp_path / "fair", tiny_recipe(), ["two-model-kd"], 1, watcher)
    assert watcher.ended == ["alone-resnet8-seed0", "alone-resnet14-seed0"]


def test_recipes_that_a_method_cannot_have_are_known_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = tiny_recipe("objective.labels=full-net")
    jobs = {job.name: job.recipe.objective for job in plan(recipe, METHODS, 1, NETS)}
    assert {name for name, objective in jobs.items() if objective.labels == "full-net"} == {
        "ekd-seed0", "kl-seed0", "attention-seed0", "adaptive-depth-seed0",
        *(f"alone-{net}-seed0" for net in NETS),
    }  # fmt: skip
    recipe = tiny_recipe("objective.kl={resnet8=1, resnet14=1}", "objective.attention=0", "objective.labels=full-net")
    with pytest.raises(RecipeError, match=r"what attention makes of the recipe: 1 mistake\n.*needs objective.kl or"):
        compare(tmp_path / "fair", recipe, ["ekd", "attention"], 1, Silent())
    assert not (tmp_path / "fair").exists()


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ([], []),
        (["objective.attention=0"], ["kl is .* same as ekd", "attention is .* same as joint"]),
        (["objective.kl=0"], ["kl is .* same as joint", "attention is .* same as ekd"]),
        (
            ["objective.kl={resnet8=1, resnet14=1}", "objective.attention=0", "objective.labels=full-net"],
            ["kl is .* same as ekd", "attention is .* can't have it: .*needs objective.kl or"],
        ),
    ],
)
def test_methods_that_nobody_named_are_left_out_where_they_add_nothing(
    overrides: list[str], left_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []

    def stop(folder: Path, jobs: list[Job], *_: object) -> dict[str, str]:
        planned.extend(dict.fromkeys(job.method for job in jobs))
        return {}

    monkeypatch.setattr("ddnn.compare._run", stop)
    watcher = Silent()
    compare(tmp_path / "fair", tiny_recipe(*overrides), None, 1, watcher)
    assert sorted(planned) == sorted(METHODS.keys() - {sentence.split()[0] for sentence in left_out})
    assert len(watcher.notes) == len(left_out)
    for note, expected in zip(watcher.notes, left_out, strict=True):
        assert re.match(expected, note)
    planned.clear()
    if "same as joint" in str(left_out):  # but whoever asks for it gets it
        compare(tmp_path / "fair", tiny_recipe(*overrides), ["joint", "kl", "attention"], 1, watcher)
        assert planned == ["joint", "kl", "attention"]


def test_a_folder_holds_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "fair").mkdir()
    (tmp_path / "fair" / "recipe.toml").write_text(tiny_recipe("optim.lr=0.3").to_toml())
    (tmp_path / "fair/runs/ekd-seed0/checkpoints").mkdir(parents=True)
    (tmp_path / "fair/runs/ekd-seed0/checkpoints/step-000000001-0123456789abcdef.pt").touch()
    with pytest.raises(RunError, match="holds a comparison of another recipe"):
        compare(tmp_path / "fair", tiny_recipe(), ["ekd"], 1, Silent())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="exists and is no comparison"):
        compare(tmp_path / "other", tiny_recipe(), ["ekd"], 1, Silent())


@pytest.mark.usefixtures("in_this_process")
def test_a_recipe_that_has_trained_nothing_yet_can_be_replaced(tmp_path: Path) -> None:
    wrong = tiny_recipe("optim.lr=0.3")
    (tmp_path / "fair").mkdir()
    (tmp_path / "fair" / "recipe.toml").write_text(wrong.to_toml())
    RunFolder.create(tmp_path / "fair/runs/ekd-seed0", wrong)
    (tmp_path / "fair/runs/ekd-seed0/log.txt").write_text("error")
    watcher = Silent()
    compare(tmp_path / "fair", tiny_recipe(), ["ekd"], 1, watcher)
    assert watcher.ended == ["ekd-seed0"]
    assert RunFolder.open(tmp_path / "fair/runs/ekd-seed0").recipe == tiny_recipe()
    assert recipes.reopen(tmp_path / "fair/recipe.toml") == tiny_recipe()
    assert any("begins anew" in note for note in watcher.notes)


def test_data_that_are_not_there_are_known_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        compare(tmp_path / "fair", tiny_recipe("data.source=/no/such/folder"), ["ekd"], 1, Silent())
    assert not (tmp_path / "fair").exists()


def test_the_estimate_is_work_left_at_the_speed_so_far(tmp_path: Path) -> None:
    recipe = tiny_recipe("train.epochs=4")
    jobs = plan(recipe, ["alone"], 1, NETS)
    assert seconds_left(tmp_path, jobs) is None
    run = RunFolder.create(tmp_path / "runs" / jobs[0].name, jobs[0].recipe)
    run.write_json("run.json", {"data": {"image_size": 16, "classes": ["a"] * 7}})
    run.write_metrics([{"epoch": e, "seconds": {"total": 10.0}} for e in (1, 2)])
    work = [macs(net, 16) for net in _plain_nets(7)]
    expected = 20 / (2 * work[0]) * (2 * work[0] + 4 * work[1] + 4 * work[2])
    assert seconds_left(tmp_path, jobs) == pytest.approx(expected)
    assert seconds_left(tmp_path, jobs, at_a_time=2) == pytest.approx(expected / 2)


def _plain_nets(classes: int = 10) -> list[torch.nn.Module]:
    from ddnn.families.cifar_resnet import resnet

    return [resnet(layers, num_classes=classes, width=8) for layers in (8, 14, 20)]


@pytest.mark.usefixtures("in_this_process")
def test_all_machines_and_versions_are_stated(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "fair", tiny_recipe()
    compare(folder, recipe, ["ekd"], 2, Silent())
    run = RunFolder.open(folder / "runs/ekd-seed1")
    about = run.read_json("run.json")
    assert about is not None
    device, torch_here = about["machine"]["device"], about["versions"]["torch"]
    about["machine"]["device"] = "NVIDIA H100"
    about["versions"]["torch"] = "0.1"
    run.write_json("run.json", about)
    content = json.loads(compare(folder, recipe, ["ekd"], 2, Silent()).read_text())
    assert content["machines"] == [device, "NVIDIA H100"]
    assert content["machine"] == f"{device}; NVIDIA H100"
    assert content["versions"] == {**about["versions"], "torch": f"{torch_here}, 0.1"}


@pytest.mark.slow
def test_trainings_are_processes_of_their_own(tmp_path: Path) -> None:
    watcher = Silent()
    compare(tmp_path / "fair", tiny_recipe(), ["ekd", "alone"], 1, watcher, engine=Local(2))
    assert sorted(watcher.ended) == sorted(["ekd-seed0", *(f"alone-{net}-seed0" for net in NETS)])
    assert "test set, last epoch" in (tmp_path / "fair" / "runs" / "ekd-seed0" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_no_training_outlives_a_killed_comparison(tmp_path: Path) -> None:
    options = [*TINY, "train.epochs=1000", "--methods", "ekd", "--seeds", "1", "-o", str(tmp_path / "fair")]
    killed = subprocess.Popen([sys.executable, "-m", "ddnn", "compare", "digits", *options])
    wait_for(lambda: list(tmp_path.glob("fair/runs/*/checkpoints/step-*.pt")))
    assert len(trainings_of(tmp_path / "fair")) == 1
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not trainings_of(tmp_path / "fair"))


def wait_for(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_engines_are_asked_for_by_name(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    asked = ("compare", "digits", "--out", tmp_path / "fair")
    for options, sentence in {
        ("--engine", "slurm"): "--engine slurm: choose local or ray",
        ("--address", "auto"): "--address auto needs --engine ray",
        ("--engine", "ray", "--address", "ray://h:1"): "--address ray://h:1: give auto or HOST:PORT",
    }.items():
        code, _, said = ddnn(*asked, *options)
        assert code == 2
        assert sentence in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "fair").exists()


def test_without_ray_it_says_what_to_install(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ddnn.compare.over_ray", raising=False)
    code, _, said = ddnn("compare", "digits", "--out", tmp_path / "fair", "--engine", "ray")
    assert code == 1
    assert said == "error: this needs the extra ray (ray is not installed): pip install 'ddnn[ray]'\n"
    assert not (tmp_path / "fair").exists()


def test_a_run_is_no_place_for_a_comparison_nor_a_comparison_a_run(finished: RunFolder, tmp_path: Path) -> None:
    before = sorted(finished.path.iterdir())
    with pytest.raises(RunError, match="holds a run, not a comparison; give another --out"):
        compare(finished.path, tiny_recipe(), ["joint"], 1, Silent())
    assert sorted(finished.path.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file exists and is no comparison"):
        compare(tmp_path / "file", tiny_recipe(), ["joint"], 1, Silent())
    (tmp_path / "fair").mkdir()
    for name in ("recipe.toml", "comparison.json"):
        (tmp_path / "fair" / name).write_bytes((finished.path / "recipe.toml").read_bytes())
    with pytest.raises(RunError, match=r"fair is a comparison and no run; its runs are the folders in .*runs"):
        RunFolder.open(tmp_path / "fair")
