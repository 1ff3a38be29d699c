"""`ddnn export` of finished runs, as a user meets it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY, Quiet
from ddnn import recipe
from ddnn.checkpoint import RunFolder
from ddnn.data import eval_batches
from ddnn.export import export_run
from ddnn.runtime import load
from ddnn.trained import load_data, load_trained
from ddnn.trainer import train
from nets import cascade, run

Call = Callable[..., tuple[int, str, str]]

SMALL = (*TINY, "network.name=cifar/resnet8", "network.width=8")
"""One net: the least there is to trace."""
TWO = "network.subnets.resnet8=[1,1,1]"


def finished(path: Path, *overrides: str) -> RunFolder:
    made = RunFolder.create(path, recipe.load("digits", list(overrides)))
    train(made, Quiet())
    return made


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished(tmp_path_factory.mktemp("runs") / "run", *SMALL, "train.epochs=6")


def test_a_run_becomes_a_bundle(ddnn: Call, one: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, printed, err = ddnn("export", one.path, "-o", out, "--json")
    assert (code, err) == (0, "")
    manifest = json.loads(printed)
    assert manifest == json.loads((out / "manifest.json").read_text())
    about, summary = one.read_json("run.json"), one.read_json("summary.json")
    assert about is not None
    assert summary is not None
    (entry,) = manifest["nets"]
    assert entry["top1"] == summary["subnets"]["resnet8"]["top1"]
    assert entry["validation"] == summary["validation"]["resnet8"]
    assert entry["parity"]["images"] == 32
    assert manifest["classes"] == about["data"]["classes"]
    assert manifest["input"]["mean"] == about["data"]["mean"]
    assert manifest["source"]["weights_sha256"] == summary["weights_sha256"]
    dataset = load_data(one.recipe)
    right = total = 0
    for x, target in eval_batches(dataset, dataset.test, 64, torch.device("cpu")):
        right += int((load(out)(x.numpy(), depth="resnet8").argmax(1) == target.numpy()).sum())
        total += len(x)
    assert right / total == pytest.approx(entry["top1"], abs=1 / total)  # the accuracy that it promises
    code, _, err = ddnn("export", one.path, "-o", out)
    assert code == 1
    assert err.strip() == f"error: {out} exists already and is not overwritten; give another place or remove it"


def test_a_run_becomes_an_int8_bundle(ddnn: Call, one: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, printed, err = ddnn(
        "export", one.path, "-o", out, "--int8", "--allowed-loss", "5", "--calibration-images", "70"
    )
    assert (code, err) == (0, "")
    for text in ("resnet8.onnx", "float32 %", "int8 %", "accuracy on 160 test images"):
        assert text in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["int8"]["calibration_images"] == 70
    summary = one.read_json("summary.json")
    assert summary is not None
    tried = manifest["int8"]["nets"]["resnet8"]
    assert tried["before"]["top1"] == pytest.approx(summary["subnets"]["resnet8"]["top1"], abs=0.01)
    assert load(out)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--format", "tflite"), 2, "--format tflite: choose bundle, onnx"),
        (("--allowed-loss", "-1"), 2, "--allowed-loss -1.0: must be 0 or more"),
        (("--int8", "--format", "onnx"), 1, "int8 comes as a bundle only, not as onnx"),
        (("--subnet", "resnet8"), 1, "a bundle holds all sub-nets"),
        (("--format", "onnx", "--subnet", "resnet9"), 1, "no net 'resnet9' in this run; it has resnet8"),
    ],
)
def test_mistakes_end_in_a_sentence(
    ddnn: Call, one: RunFolder, tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    got, _, err = ddnn("export", one.path, "-o", tmp_path / "out", *arguments)
    assert got == code
    assert sentence in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(ddnn: Call, tiny: Callable[..., RunFolder], tmp_path: Path) -> None:
    code, _, err = ddnn("export", tiny("begun").path, "-o", tmp_path / "out")
    assert code == 1
    assert "is not finished; go on with: ddnn train --resume" in err


@pytest.mark.slow
def test_a_run_with_recalibrated_norms_is_exported(tmp_path: Path) -> None:
    made = finished(tmp_path / "run", *SMALL, "network.name=cifar/resnet14", "network.norm=recalibrated", TWO)
    manifest = export_run(made, tmp_path / "bundle")
    net, _ = load_trained(made)
    x = torch.randn(4, 3, 8, 8)
    chain = cascade(tmp_path / "bundle", manifest, x.numpy())
    for name, output in net(x).items():
        for got in (chain[name], run(tmp_path / "bundle" / f"{name}.onnx", images=x.numpy())["logits"]):
            np.testing.assert_allclose(got, output.logits.detach().numpy(), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_killed_export_leaves_no_half_bundle(one: RunFolder, tmp_path: Path) -> None:
    """SIGKILL as soon as the folder that becomes the bundle holds so many files; four are all."""
    command = [sys.executable, "-m", "ddnn", "export", str(one.path), "-o", str(tmp_path / "bundle")]
    for files in (2, 4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            beside = list(tmp_path.glob(".bundle.*.tmp"))
            if beside and len(list(beside[0].glob("*"))) >= files:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        assert files == 4 or process.returncode == -signal.SIGKILL
        assert not (tmp_path / "bundle").exists() or load(tmp_path / "bundle").depths  # all, or nothing
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)  # the last may have been too fast to be killed
    export_run(one, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
