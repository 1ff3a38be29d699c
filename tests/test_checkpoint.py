"""Files of the run folder: atomic, self-checking, never unpickled."""

import errno
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Quiet
from ddnn import checkpoint, recipe
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.errors import RecipeError, RunError
from ddnn.evaluate import parameters
from ddnn.families.cifar_resnet import resnet
from ddnn.files import write_atomic
from ddnn.recipe import Network
from ddnn.trainer import train

Make = Callable[..., RunFolder]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write .*file: No space left on device; what was saved before is intact"
    ):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_half_written_is_swept_up(tiny: Make) -> None:
    run = tiny("run")
    run.save_checkpoint(1, {})
    torn = run.path / "checkpoints" / ".step-000000002-x.pt.1.tmp"
    torn.write_bytes(b"half")
    looking = RunFolder.open(run.path)
    assert torn.exists(), "who only looks can't know whether it is being written"
    looking.sweep()
    assert not torn.exists()
    assert looking.load_checkpoint() == {}


def test_one_training_at_a_time(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LINGER_S", 0.3)
    run = tiny("run")
    with (
        run.held(),
        pytest.raises(RunError, match=r"another training is writing to .*run; let it end, or stop it first"),
    ):
        train(RunFolder.open(run.path), Quiet())
    assert {path.name for path in run.path.iterdir()} == {"recipe.toml"}, "nothing is left of the attempt"
    train(RunFolder.open(run.path), Quiet())


def test_a_training_that_has_just_begun_keeps_its_recipe(tiny: Make) -> None:
    run = tiny("run", "optim.lr=0.1")
    other = recipe.load("digits", ["optim.lr=0.7"])
    with run.held(), pytest.raises(RunError, match="another training is writing to"):
        RunFolder.create(run.path, other)
    assert RunFolder.open(run.path).recipe == run.recipe
    assert RunFolder.create(run.path, other).recipe == other, "what never began may be begun anew"


def test_a_killed_training_holds_nothing(tiny: Make) -> None:
    run = tiny("run")
    code = (
        "import sys, time; from pathlib import Path; from ddnn.checkpoint import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
    with run.held():
        pass


def test_only_the_last_two_checkpoints_are_kept(tiny: Make) -> None:
    run = tiny("run")
    for step in (1, 20, 300):
        run.save_checkpoint(step, {"step": step})
    assert len(list(run.path.glob("checkpoints/*"))) == 2
    assert run.load_checkpoint() == {"step": 300}


def test_a_checkpoint_with_code_in_it_is_not_run(tiny: Make, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    run = tiny("run")
    buffer = io.BytesIO()
    torch.save({"step": Payload()}, buffer)
    content = buffer.getvalue()
    (run.path / "checkpoints").mkdir()
    name = f"step-000000001-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    (run.path / "checkpoints" / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} holds more than a checkpoint does and is not loaded"):
        run.load_checkpoint()
    assert not (tmp_path / "owned").exists()


def test_weights_are_stored_once_and_come_back(tiny: Make) -> None:
    run = tiny("run")
    torch.manual_seed(0)
    net = build(Network(width=4, head="private", norm="recalibrated"), 10).to(memory_format=torch.channels_last)
    digest = run.save_weights(net)
    assert (run.path / "model.safetensors").stat().st_size < 4 * parameters(net) * 1.5
    other = build(Network(width=4, head="private", norm="recalibrated"), 10)
    run.load_weights(other, digest)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert any(name.startswith("nets.resnet20") for name in net.state_dict())
    with pytest.raises(RunError, match="is damaged or was replaced"):
        run.load_weights(other, "0" * 64)
    with pytest.raises(RunError, match="holds other tensors than the network"):
        run.load_weights(build(Network(width=8), 10), digest)


def test_a_torn_last_line_of_metrics_is_left_out(tiny: Make) -> None:
    run = tiny("run")
    run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert run.metrics() == [{"epoch": 1}]


def test_a_damaged_summary_is_named(tiny: Make) -> None:
    run = tiny("run")
    (run.path / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary.json is damaged and cannot be read"):
        run.read_json("summary.json")


def test_start_weights_must_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = {"name": "cifar-resnet8-14-20", "width": 4}
    torch.manual_seed(1)
    trained = resnet(20, num_classes=10, width=4)
    good = tmp_path / "good.safetensors"
    save_file(trained.state_dict(), good)
    net = build(Network(**network, weights=good), 10)
    assert torch.equal(net.nets["resnet8"].layer3[0].conv2.weight, trained.layer3[0].conv2.weight)
    torch.save(trained.state_dict(), tmp_path / "good.pt")
    assert torch.equal(
        build(Network(**network, weights=tmp_path / "good.pt"), 10).nets["resnet20"].fc.weight, trained.fc.weight
    )

    with pytest.raises(RecipeError, match=r"another number of classes: it holds fc.bias .*\(10,\), .* \(7,\)"):
        build(Network(**network, weights=good), 7)
    with pytest.raises(RecipeError, match=r"good.safetensors is of another network: \d+ tensors missing"):
        build(Network(name="cifar-resnet20-32-44", width=4, weights=good), 10)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(good.read_bytes()[:-10])
    empty, junk = tmp_path / "empty.pt", tmp_path / "junk.pt"
    empty.touch()
    junk.write_bytes(b"exxxx")
    for damaged in (torn, empty, junk):
        with pytest.raises(RecipeError, match=rf"{damaged.name} is damaged"):
            build(Network(**network, weights=damaged), 10)
    torch.save({"model": trained}, tmp_path / "pickled.pt")
    with pytest.raises(RecipeError, match=r"pickled.pt is damaged or holds more than weights, and is not loaded"):
        build(Network(**network, weights=tmp_path / "pickled.pt"), 10)
