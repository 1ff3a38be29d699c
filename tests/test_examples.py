"""The examples, each by the command on its first lines, and what each loop must not get wrong.

An example whose library is not installed is skipped; `pip install 'ddnn[examples]'` brings them all.
"""

import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddnn
from ddnn.network import DDNN

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "lightning_module": "lightning",
    "timm_train": "timm",
}


def commands() -> list[tuple[str, str]]:
    """Every example and the commands in its docstring."""
    found = []
    for path in sorted(EXAMPLES.glob("*.py")):
        docstring = path.read_text().split('"""')[1]
        lines = re.findall(r"^(?:python|accelerate launch) .*$", docstring, flags=re.MULTILINE)
        found += [(path.stem, line) for line in lines]
    return found


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; its neighbours can be imported, as when it runs."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install 'ddnn[examples]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_example_names_its_command() -> None:
    with_commands = {name for name, _ in commands()}
    assert with_commands == {path.stem for path in EXAMPLES.glob("*.py")} - {"digits", "shapes"}
    assert set(NEEDS) < with_commands


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "command"), commands(), ids=[command for _, command in commands()])
def test_runs_from_its_command_and_learns(name: str, command: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install 'ddnn[examples]'")
    words = command.split()
    start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "accelerate.commands.launch"]
    words = start + words[1 if words[0] == "python" else 2 :]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    if name == "detection":
        found = re.findall(r"^(resnet\d+) +average precision ([\d.]+)$", done.stdout, flags=re.MULTILINE)
        assert [net for net, _ in found] == ["resnet8", "resnet14", "resnet20"]
        # By chance next to nothing is right at an overlap of one half.
        assert all(float(precision) > 0.4 for _, precision in found), found
    else:
        found = re.findall(r"^(resnet\d+) +([\d.]+) %$", done.stdout, flags=re.MULTILINE)
        assert len(found) == (2 if name == "timm_train" else 3), done.stdout
        assert all(float(top1) > 85 for _, top1 in found), found  # one class in ten: by chance 10


# -- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of their libraries about themselves
def test_lightning_goes_on_bitwise_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("lightning_module", monkeypatch)
    train, _ = loop.digits()
    batches = loop.DataLoader(torch.utils.data.Subset(train, range(128)), batch_size=32)

    # The schedule must not depend on what is left to do.
    monkeypatch.setattr(
        loop.Nested, "configure_optimizers", lambda self: torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
    )

    def fit(model: Any, folder: Path, checkpoint: Path | None = None) -> None:
        every_epoch = loop.lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        trainer = loop.lightning.Trainer(
            max_epochs=2, accelerator="cpu", precision="bf16-mixed" if loop.BF16 else "32-true",
            accumulate_grad_batches=2, logger=False,
            callbacks=[loop.EMAWeightAveraging(decay=0.9), every_epoch], default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, batches, ckpt_path=checkpoint, weights_only=True)

    torch.manual_seed(0)
    whole = loop.Nested()
    again = copy.deepcopy(whole)
    fit(whole, tmp_path / "whole")
    half = tmp_path / "whole" / "epoch=0.ckpt"
    held = torch.load(half, weights_only=True)["state_dict"]
    assert len({t.data_ptr() for t in held.values()}) == len(held)
    fit(again, tmp_path / "again", half)
    assert equal(whole.net, again.net)
    assert not all(torch.equal(t, held[f"net.{name}"]) for name, t in whole.net.state_dict().items())


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of their libraries about themselves
def test_trainer_goes_on_bitwise_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = example("hf_trainer", monkeypatch)
    train, _ = loop.digits()
    data = loop.Named(torch.utils.data.Subset(train, range(128)))

    def make(net: DDNN) -> Any:
        arguments = loop.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=32, learning_rate=1e-3,
            gradient_accumulation_steps=2, bf16=loop.BF16, use_cpu=True, save_strategy="epoch", report_to=[],
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        return loop.Trainer(loop.ForTrainer(net, ddnn.EKD()), arguments, train_dataset=data)

    torch.manual_seed(0)
    start = loop.make_net()
    whole, again = copy.deepcopy(start), copy.deepcopy(start)
    make(whole).train()
    first = tmp_path / "checkpoint-2"
    assert (first / "model.safetensors").is_file()
    assert (first / "model.safetensors").stat().st_size < 1.2 * sum(4 * p.numel() for p in start.parameters())
    capfd.readouterr()
    make(again).train(resume_from_checkpoint=str(first))
    assert equal(whole, again)
    assert "missing keys" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of their libraries about themselves
def test_accelerate_saves_and_loads_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("accelerate_loop", monkeypatch)
    torch.manual_seed(0)
    net = loop.make_net()
    kept = copy.deepcopy(net)
    accelerator = loop.Accelerator(cpu=True)
    model = accelerator.prepare(net)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "model"))
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert equal(net, kept)
    from safetensors.torch import load_file

    other = loop.make_net()
    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=True)
    assert equal(other, kept)
    accelerator.end_training()


# -- timm -------------------------------------------------------------------------------------------------------------


def test_timms_nets_nest_and_leave_as_timms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("timm_train", monkeypatch)
    torch.manual_seed(0)
    net = loop.make_net().eval()
    x = torch.randn(2, 3, 32, 32)
    outputs = net(x)
    for name in net.depths:
        theirs = loop.timm.create_model(name, **loop.SMALL).eval()
        theirs.load_state_dict(net.subnet(name).state_dict(), strict=True)
        assert torch.equal(theirs(x), outputs[name].logits)


def test_timms_moving_average_takes_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("timm_train", monkeypatch)
    torch.manual_seed(0)
    task = loop.EKDTask(loop.make_net(), criterion=ddnn.EKD(), verbose=False)
    average = task.setup_ema(decay=0.75)
    before = {name: tensor.clone() for name, tensor in average.module.named_parameters()}
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1.0)
    task.update_ema()
    now = dict(task.trainable_module.named_parameters())
    for name, tensor in average.module.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * now[name])


def test_timms_task_gives_the_objective_and_its_checkpoint_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("timm_train", monkeypatch)
    torch.manual_seed(0)
    task = loop.EKDTask(loop.make_net(), criterion=ddnn.EKD(), verbose=False)
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    result = task(x, target)
    terms = ddnn.EKD()(task.trainable_module(x), target)
    torch.testing.assert_close(result["loss"], sum(terms.values()))
    mixed, probabilities = loop.Mixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0)(x, target)
    soft: Tensor = task(mixed, probabilities)["loss"]
    assert soft.isfinite()
    other = loop.EKDTask(loop.make_net(), criterion=ddnn.EKD(), verbose=False)
    other.load_checkpoint_state(task.get_checkpoint_state()["state_dict"])
    assert equal(task, other)


# -- detection --------------------------------------------------------------------------------------------------------


def test_average_precision_of_cases_known_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = example("shapes", monkeypatch)
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    truth = [{"boxes": box, "labels": torch.tensor([1, 1])}]

    def found(boxes: Tensor, scores: list[float], label: int = 1) -> list[dict[str, Tensor]]:
        return [{"boxes": boxes, "labels": torch.full((len(boxes),), label), "scores": torch.tensor(scores)}]

    others = 1 / len(shapes.CLASSES)  # the classes that nothing shows count as nothing found

    def precision(*arguments: Any, **more: Any) -> float:
        return shapes.average_precision(found(*arguments, **more), truth) / others

    assert precision(box, [0.9, 0.8]) == pytest.approx(1.0)
    assert precision(box[:1], [0.9]) == pytest.approx(0.5)  # half of them, and nothing wrong
    assert precision(box[[0, 0]], [0.9, 0.8]) == pytest.approx(0.5)  # the second time is wrong
    wrong = torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    assert precision(torch.cat([wrong, box]), [0.9, 0.8, 0.7]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert precision(torch.cat([box[:1], wrong, box[1:]]), [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)
    assert precision(box, [0.9, 0.8], label=2) == 0.0
    assert precision(box + 4.0, [0.9, 0.8]) == 0.0  # an overlap of 36 in 164
    assert precision(box + torch.tensor([0.0, 0.0, 5.0, 0.0]), [0.9, 0.8]) == pytest.approx(1.0)  # of 2 in 3


def test_shapes_fill_their_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = example("shapes", monkeypatch)
    images, targets = shapes.make_shapes(20, size=64, seed=3)
    assert images.shape == (20, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(images, shapes.make_shapes(20, size=64, seed=3)[0], strict=True))
    labels = torch.cat([target["labels"] for target in targets])
    assert set(labels.tolist()) == {1, 2, 3}
    boxes = torch.cat([target["boxes"] for target in targets])
    assert bool(((boxes >= 0) & (boxes <= 64)).all())
    squares = [(i, b) for i, t in zip(images, targets, strict=True) for b in t["boxes"][t["labels"] == 2].int()]
    for image, (left, top, right, bottom) in squares:
        inside = image[:, top:bottom, left:right]
        assert float((inside.amax((1, 2)) - inside.amin((1, 2))).max()) <= 0.2 + 1e-6  # one colour and a little noise


def test_a_detector_of_every_depth_is_that_of_the_extracted_network(monkeypatch: pytest.MonkeyPatch) -> None:
    detection = example("detection", monkeypatch)
    torch.manual_seed(0)
    net = ddnn.nest(*ddnn.families.build("cifar-resnet8-14-20", 10, 4)).eval()
    detector = detection.Detector(net).eval()
    images = torch.rand(2, 3, 64, 64)
    for depth in net.depths:
        alone = detection.Detector(ddnn.nest(net.subnet(depth), {}, full_name="alone")).eval()
        alone.depths["alone"].head.load_state_dict(detector.depths[depth].head.state_dict())
        alone.depths["alone"].backbone.pyramid.load_state_dict(detector.depths[depth].backbone.pyramid.state_dict())
        for ours, theirs in zip(detector(images, depth), alone(images, "alone"), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_detectors_losses_reach_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    detection = example("detection", monkeypatch)
    torch.manual_seed(0)
    detector = detection.Detector(ddnn.nest(*ddnn.families.build("cifar-resnet8-14-20", 10, 4)))
    images, targets = example("shapes", monkeypatch).make_shapes(2)
    losses = [loss for depth in detector.depths for loss in detector(images, depth, targets).values()]
    sum(losses).backward()
    assert all(p.grad is not None for p in detector.parameters())
