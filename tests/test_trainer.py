"""Training: repeats bitwise, resumes bitwise from any kill, stops on a loss that is not finite."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import TINY, Quiet, exact
from ddnn import data, recipe, trainer
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.device import has_bf16
from ddnn.errors import DDNNError, RunError
from ddnn.evaluate import accuracy
from ddnn.state import State
from ddnn.trained import evaluate_run, load_data, load_trained
from ddnn.trainer import train, train_step

Make = Callable[..., RunFolder]


class Killed(Exception):  # noqa: N818
    """Stands for a kill inside the process."""


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model.safetensors")


def assert_bitwise(a: RunFolder, b: RunFolder) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def test_a_run_leaves_what_it_promises(tiny: Make) -> None:
    run = tiny("run")
    summary = train(run, Quiet())
    assert summary == json.loads((run.path / "summary.json").read_text())
    assert list(summary["subnets"]) == ["resnet8", "resnet14", "resnet20"]
    for row in summary["subnets"].values():
        assert set(row) == {"depths", "top1", "top5", "params", "macs", "latency_ms"}
        assert 0 <= row["top1"] <= row["top5"] <= 1
        assert row["latency_ms"] > 0
    assert 0 < summary["step_cost"]["bound"] < 1
    assert RunFolder.open(run.path).recipe == run.recipe
    about = json.loads((run.path / "run.json").read_text())
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["data"]["classes"] == [str(d) for d in range(10)]
    assert [epoch["epoch"] for epoch in run.metrics()] == [1, 2]
    assert set(run.metrics()[0]["terms"]) == {
        "resnet20/ce",
        *(f"{name}/{term}" for name in ("resnet8", "resnet14") for term in ("ce", "kl", "attention")),
    }
    assert list((run.path / "tensorboard").iterdir())
    net, _ = load_trained(run)
    assert torch.equal(net.nets["resnet8"].conv1.weight, weights(run)["nets.resnet20.conv1.weight"])
    assert train(run, Quiet()) == summary  # a finished run is not trained again


def test_it_learns(tiny: Make) -> None:
    run = tiny("run", "data.limit=600", "train.epochs=8", "network.width=8", "optim.lr=0.05")
    summary = train(run, Quiet())
    assert all(row["top1"] > 0.6 for row in summary["subnets"].values())


def test_seeds_repeat_bitwise_and_differ(tiny: Make) -> None:
    one, again, other = tiny("one"), tiny("again"), tiny("other", "train.seed=1")
    for run in (one, again, other):
        torch.manual_seed(hash(run.path.name) % 1000)  # whatever the process drew before
        train(run, Quiet())
    assert_bitwise(one, again)
    assert exact(one) == exact(again)
    with pytest.raises(AssertionError):
        assert_bitwise(one, other)


HALF = ("train.precision=bf16",) if has_bf16(torch.device("cpu")) else ()

VARIANTS = {
    "plain": (),
    "ema": ("train.ema=0.9", "train.accumulate=2", "optim.clip_norm=1.0"),
    "adamw": ("optim.name=adamw", "optim.lr=0.003", "schedule.name=cosine", "schedule.warmup_epochs=0.5"),
    "mixed": ("augment.mixup=0.2", "augment.cutmix=1.0", "augment.erasing=0.2", *HALF),
    "recalibrated": ("network.norm=recalibrated", "network.head=private", "schedule.name=multistep"),
    "lean": ("train.lean=true", "train.accumulate=2"),
    "joined": ("train.full_net_share=0.5", "optim.momentum=0.8", "train.ema=0.9"),
    "strong": ("augment.policy=randaugment", "augment.crop=resized", "objective.attention_map=softmax"),
}


@pytest.mark.parametrize(
    "variant", [v if v in ("plain", "lean", "joined") else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_resume_after_a_kill_at_any_step_is_bitwise(tiny: Make, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)  # a checkpoint after every step
    whole = tiny("whole", *VARIANTS[variant])
    train(whole, Quiet())
    steps = whole.metrics()[-1]["step"]
    killed = tiny("killed", *VARIANTS[variant])
    for moment in sorted({1, steps // 2 - 1, steps // 2, steps // 2 + 1, steps}):

        def kill(done: int, moment: int = moment) -> None:
            if done == moment:
                raise Killed

        with pytest.raises(Killed):
            train(RunFolder.open(killed.path), Quiet(kill))
        torch.randn(moment)  # the process that resumes is another
    train(RunFolder.open(killed.path), Quiet())
    assert_bitwise(whole, killed)
    assert exact(whole) == exact(killed)


def test_a_run_that_goes_on_elsewhere_tells_of_both(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    run, began = tiny("run"), None
    for moment, commit in ((1, "first"), (2, "first"), (3, "second"), (4, "second")):
        monkeypatch.setattr(trainer, "commit", lambda commit=commit: commit)

        def kill(done: int, moment: int = moment) -> None:
            if done == moment:
                raise Killed

        with pytest.raises(Killed):
            train(RunFolder.open(run.path), Quiet(kill))
        began = began or run.read_json("run.json")
    about = run.read_json("run.json")
    assert began is not None
    assert about is not None
    here = {what: began[what] for what in ("versions", "machine")}
    assert about == {**began, "resumed": [{"step": 1, **here, "commit": "second"}]}
    assert about["commit"] == "first"


@pytest.mark.slow
def test_resume_after_sigkill_is_bitwise(tmp_path: Path, tiny: Make) -> None:
    whole = tiny("whole", "train.epochs=6")
    train(whole, Quiet())
    path = tmp_path / "killed"
    command = [sys.executable, "-m", "ddnn", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["digits", *TINY, "train.epochs=6", "--out", str(path)]
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL)
    while not list(path.glob("checkpoints/*.pt")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = subprocess.run(
        [*command, "--resume", str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "resumed after step" in finished.stdout
    assert_bitwise(whole, RunFolder.open(path))


def interrupted(tiny: Make, name: str) -> RunFolder:
    """A run killed in its second epoch, with two checkpoints."""

    def kill(done: int) -> None:
        if done == 8:
            raise Killed

    run = tiny(name)
    with pytest.raises(Killed):
        train(run, Quiet(kill))
    assert len(list(run.path.glob("checkpoints/*.pt"))) == 2
    return run


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    whole = tiny("whole")
    train(whole, Quiet())
    run = interrupted(tiny, "torn")
    newest = max(run.path.glob("checkpoints/*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(RunFolder.open(run.path), Quiet())
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert_bitwise(whole, run)


def test_with_nothing_but_damaged_checkpoints_it_says_so(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    run = interrupted(tiny, "torn")
    for path in run.path.glob("checkpoints/*.pt"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"every checkpoint in .*checkpoints is damaged \(step-0"):
        train(RunFolder.open(run.path), Quiet())


def test_a_checkpoint_of_another_recipe_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    run = interrupted(tiny, "run")
    text = (run.path / "recipe.toml").read_text()
    (run.path / "recipe.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.8"))
    with pytest.raises(RunError, match="belongs to another recipe than"):
        train(RunFolder.open(run.path), Quiet())


def test_a_run_goes_on_in_a_version_with_more_settings(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny("whole")
    train(whole, Quiet())
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    run = interrupted(tiny, "run")
    to_toml = recipe.Recipe.to_toml
    monkeypatch.setattr(recipe.Recipe, "to_toml", lambda of: to_toml(of) + "novel = 1\n")
    train(RunFolder.open(run.path), Quiet())
    assert_bitwise(whole, run)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Make) -> None:
    run = tiny("run", "optim.lr=1e20", "schedule.name=constant")
    with pytest.raises(
        RunError, match=r"term resnet\d+/\w+ is (nan|inf) at step \d+; the last good checkpoint, if there was one"
    ):
        train(run, Quiet())
    assert not (run.path / "summary.json").exists()


def test_no_checkpoint_is_written_after_a_bad_loss(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    run = tiny("run")
    real = trainer.train_step

    def poisoned(state: State, x: torch.Tensor, target: torch.Tensor) -> object:
        terms, logits = real(state, x, target)
        if state.step == 7:
            terms["resnet14/kl"] = terms["resnet14/kl"] * float("nan")
        return terms, logits

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(RunError, match="term resnet14/kl is nan at step 7"):
        train(run, Quiet())
    kept = RunFolder.open(run.path).load_checkpoint()
    assert kept is not None
    assert kept["step"] == 6


def test_weights_that_are_not_finite_are_never_kept(tiny: Make) -> None:
    """One step with a rate so high that the next loss would tell, were there a next one."""
    run = tiny("run", "data.limit=32", "train.epochs=1", "optim.lr=1e39", "schedule.name=constant")
    with pytest.raises(RunError, match=r"the weights are no longer finite: nets\.resnet\S+ after step 1"):
        train(run, Quiet())
    assert not list(run.path.glob("checkpoints/*"))
    assert not (run.path / "summary.json").exists()


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / kind / f"{i}.png")
    overrides = [f"data.source={folder}", "train.epochs=1", "train.batch_size=4", "network.width=8"]
    run = RunFolder.create(tmp_path / "run", recipe.load("digits", overrides))
    train(run, Quiet())
    assert evaluate_run(run, None, torch.device("cpu"))["subnets"]
    about = run.read_json("run.json")
    assert about is not None
    former = data.load(run.recipe.data, 0).former
    run.write_json("run.json", about | {"data": about["data"] | {"fingerprint": former}})
    assert evaluate_run(run, None, torch.device("cpu"))["subnets"]  # as a run of an earlier version
    run.write_json("run.json", about)
    (folder / "a" / "0.png").rename(folder / "a" / "new.png")  # as many as before
    with pytest.raises(RunError, match=r"have changed since the run in .* began"):
        evaluate_run(run, None, torch.device("cpu"))
    (run.path / "summary.json").unlink()
    with pytest.raises(RunError, match=r"have changed since the run in .* began"):
        train(RunFolder.open(run.path), Quiet())


def test_a_recalibrated_run_validates_what_it_keeps(tiny: Make) -> None:
    run = tiny("run", "network.norm=recalibrated", "data.validation=0.3", "augment.mixup=0.5")
    summary = train(run, Quiet())
    net, _ = load_trained(run)
    assert net.calibrated
    dataset = load_data(run.recipe)
    batches = data.eval_batches(dataset, dataset.validation, 500, torch.device("cpu"))
    assert accuracy(net, batches) == summary["validation"]


def test_a_training_sweeps_up_what_a_kill_left(tiny: Make) -> None:
    run = tiny("run", "train.epochs=1")
    (run.path / "checkpoints").mkdir()
    torn = run.path / "checkpoints" / ".step-000000002-x.pt.1.tmp"
    torn.write_bytes(b"half")
    train(run, Quiet())
    assert not torn.exists()


def test_float64_reaches_teacher_and_recalibration(tiny: Make, tmp_path: Path) -> None:
    train(tiny("teacher", "network.alone=resnet20", "train.epochs=1"), Quiet())
    double = ("train.precision=float64", "train.epochs=1", f"objective.teacher={tmp_path}/teacher")
    run = tiny("run", *double, "network.norm=recalibrated")
    assert train(run, Quiet())["epochs"] == 1


@pytest.mark.parametrize("what", ["subnet_weight", "kl", "attention"])
def test_weights_must_name_the_sub_nets(tiny: Make, what: str) -> None:
    run = tiny("run", f"objective.{what}.resnet8=1", f"objective.{what}.resnt14=1")
    sentence = f"{what} names resnet8, resnt14, but the nets that are taught are resnet8, resnet14"
    with pytest.raises(DDNNError, match=sentence):
        train(run, Quiet())


def test_weights_by_name_are_those_of_every_net_where_another_network_teaches(tiny: Make, tmp_path: Path) -> None:
    train(tiny("teacher", "network.alone=resnet20", "objective.kl={resnet8=1, resnet14=0}"), Quiet())  # none is taught
    taught = (f"objective.teacher={tmp_path}/teacher", "train.epochs=1")
    with pytest.raises(
        DDNNError, match="kl names resnet8, but the nets that are taught are resnet8, resnet14, resnet20"
    ):
        train(tiny("short", *taught, "objective.kl={resnet8=1}"), Quiet())
    run = tiny("run", *taught, "objective.kl={resnet8=1, resnet14=0, resnet20=2}", "objective.attention=0")
    train(run, Quiet())
    assert set(run.metrics()[0]["terms"]) == {"resnet8/ce", "resnet8/kl", "resnet14/ce", "resnet20/ce", "resnet20/kl"}


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_within_rounding(tiny: Make) -> None:
    short = ("train.epochs=1", "network.alone=resnet8")  # of a whole tree test_compiling compiles a step
    runs = [tiny(f"compile-{flag}", f"train.compile={flag}", *short) for flag in ("false", "true")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for run in runs:
            train(run, Quiet())
    eager, compiled = (run.metrics()[0]["terms"] for run in runs)
    assert compiled == pytest.approx(eager, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["plain", "mixed", "lean"])
def test_on_a_gpu_a_run_repeats_and_resumes_bitwise(tiny: Make, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    whole, killed = (tiny(name, "train.device=cuda", *VARIANTS[variant]) for name in ("whole", "killed"))
    train(whole, Quiet())

    def kill(done: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        train(killed, Quiet(kill))
    train(RunFolder.open(killed.path), Quiet())
    assert_bitwise(whole, killed)


def make_state(*overrides: str) -> tuple[State, torch.Tensor, torch.Tensor]:
    chosen = recipe.load("digits", [*TINY, *overrides])
    torch.manual_seed(0)
    state = State.fresh(chosen, build(chosen.network, 10), 5, torch.device("cpu"))
    return state, torch.randn(32, 3, 8, 8), torch.arange(32) % 10


def test_accumulation_takes_the_same_step() -> None:
    """With norms at rest; batch norms in training see a part at a time."""
    nets = []
    for parts in (1, 4):
        state, x, target = make_state(f"train.accumulate={parts}")
        state.net.eval()
        terms, logits = train_step(state, x, target)
        nets.append((state.net.state_dict(), terms, logits))
    for name, value in nets[0][1].items():
        torch.testing.assert_close(value, nets[1][1][name])
    assert nets[1][2]["resnet8"].shape == (32, 10)
    for name, tensor in nets[0][0].items():
        torch.testing.assert_close(tensor, nets[1][0][name], rtol=1e-4, atol=1e-6)


def test_lean_takes_the_same_step() -> None:
    states = []
    for lean in ("false", "true"):
        state, x, target = make_state(f"train.lean={lean}")
        terms, _ = train_step(state, x, target)
        states.append((state.net.state_dict(), terms))
    assert all(torch.equal(states[0][1][name], states[1][1][name]) for name in states[0][1])
    for name, tensor in states[0][0].items():
        torch.testing.assert_close(tensor, states[1][0][name], rtol=1e-4, atol=1e-6)


def test_the_moving_average_is_the_written_out_one() -> None:
    state, x, target = make_state("train.ema=0.8")
    expected = None
    for _ in range(4):
        train_step(state, x, target)
        now = {k: v.clone() for k, v in state.net.state_dict().items() if v.is_floating_point()}
        expected = now if expected is None else {k: 0.8 * expected[k] + 0.2 * now[k] for k in now}
    kept = state.kept_net.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped() -> None:
    state, x, target = make_state("optim.clip_norm=0.001", "optim.momentum=0", "optim.nesterov=false", "optim.lr=1")
    before = [p.detach().clone() for p in state.net.parameters()]
    for group in state.optimizer.param_groups:
        group["weight_decay"], group["lr"] = 0.0, 1.0
    train_step(state, x, target)
    moved = torch.stack([(a - b).norm() for a, b in zip(before, state.net.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.001, rel=1e-2)


def test_seconds_are_accounted_for_across_a_kill(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)

    def slow_then_killed(done: int) -> None:
        time.sleep(0.05)
        if done == 4:
            raise Killed

    run = tiny("run")
    with pytest.raises(Killed):
        train(run, Quiet(slow_then_killed))
    train(RunFolder.open(run.path), Quiet())
    assert run.metrics()[0]["seconds"]["total"] > 3 * 0.05  # the sleeps before the checkpoint of step 3 and 2 more
    for epoch in run.metrics():
        parts = sum(spent for what, spent in epoch["seconds"].items() if what not in ("total", "cpu"))
        assert 0 < parts <= epoch["seconds"]["total"] + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name != "digits"])
def test_every_shipped_recipe_trains_for_some_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images made here, with everything the recipe says but the data and the length."""
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for kind in ("a", "b", "c"):
        (folder / kind).mkdir(parents=True)
        for i in range(16):
            pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    small = ["train.epochs=1", "train.batch_size=8", "schedule.warmup_epochs=0", "data.image_size=32"]
    if recipe.load(name).train.full_net_share:
        small += ["train.epochs=2"]  # one of which is the full-net's
    run = RunFolder.create(tmp_path / "run", recipe.load(name, [f"data.source={folder}", "data.workers=1", *small]))
    summary = train(run, Quiet())
    assert run.metrics()[-1]["step"] >= 3
    assert data.load(run.recipe.data, 0).classes == ("a", "b", "c")
    assert all(0 <= row["top1"] <= 1 for row in summary["subnets"].values())
