"""What a processor can't do is said before a training begins, instead of a wait of days or a crash."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import TINY, Quiet
from ddnn import recipe as recipes
from ddnn.checkpoint import RunFolder
from ddnn.device import check_able, settled, with_precision
from ddnn.errors import RunError
from ddnn.families.cifar_resnet import resnet
from ddnn.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """As if torch found this one: `AVX512` or `AVX2`."""

    def found(capability: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr("ddnn.device.has_bf16", lambda device: device.type != "cpu" or capability == "AVX512")

    return found


def test_16_bits_are_refused_where_they_are_slow(processor: Callable[[str], None]) -> None:
    net = resnet(8, num_classes=2)
    processor("AVX2")
    with pytest.raises(RunError, match=r"no instructions for it .* can have train.precision=float32, or auto"):
        check_able(net, CPU, "bf16", channels_last=False)
    check_able(net, CPU, "float32", channels_last=True)
    check_able(net, torch.device("cuda"), "bf16", channels_last=True)
    processor("AVX512")
    check_able(net, CPU, "bf16", channels_last=True)


def test_a_layout_that_crashes_is_refused(processor: Callable[[str], None]) -> None:
    narrow, wide = resnet(8, num_classes=2, width=4), resnet(8, num_classes=2, width=8)
    processor("AVX2")
    with pytest.raises(RunError, match=r"crashes in the gradient of \S+, .* use train.channels_last=false here"):
        check_able(narrow, CPU, "float32", channels_last=True)
    check_able(wide, CPU, "float32", channels_last=True)
    check_able(narrow, CPU, "float32", channels_last=False)
    processor("AVX512")
    check_able(narrow, CPU, "float32", channels_last=True)


AUTO = (*TINY, "train.precision=auto")


@pytest.mark.parametrize(("capability", "precision"), [("AVX2", "float32"), ("AVX512", "bf16")])
def test_auto_is_what_the_processor_is_fast_in(
    tmp_path: Path, processor: Callable[[str], None], capability: str, precision: str
) -> None:
    processor(capability)
    run = RunFolder.create(tmp_path / "run", recipes.load("digits", AUTO))
    assert run.recipe.train.precision == precision
    assert RunFolder.open(tmp_path / "run").recipe == run.recipe
    assert settled(run.recipe) is run.recipe
    expected = recipes.load("digits", [*TINY, f"train.precision={precision}"])
    assert run.recipe == expected


def test_what_auto_was_stays_on_another_processor(tmp_path: Path, processor: Callable[[str], None]) -> None:
    recipe, other = (recipes.load("digits", [*AUTO, f"train.seed={seed}"]) for seed in (0, 1))
    processor("AVX512")
    RunFolder.create_or_open(tmp_path / "run", recipe)
    processor("AVX2")
    assert RunFolder.create_or_open(tmp_path / "run", recipe).recipe.train.precision == "bf16"
    with pytest.raises(RunError, match="another recipe"):
        RunFolder.create_or_open(tmp_path / "run", other)
    assert settled(other, settled(recipe)).train.precision == "float32"


def test_a_comparison_is_of_one_precision(
    ddnn: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    processor: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor of another kind too, though its trainings can't go on there."""
    monkeypatch.setattr(
        "ddnn.compare._run", lambda folder, jobs, *rest: {job.recipe.train.precision: "" for job in jobs}
    )
    monkeypatch.setattr("ddnn.compare._reason", lambda *given: "")
    command = ("compare", "digits", *AUTO, "--out", tmp_path / "fair", "--seeds", 1)
    processor("AVX512")
    code, _, err = ddnn(*command)
    assert (code, "trainings failed: bf16 ()." in err) == (1, True), err
    processor("AVX2")
    code, _, err = ddnn(*command)
    assert (code, "what was begun in bf16 goes on elsewhere" in err) == (1, True), err


def test_a_comparison_that_cannot_go_on_here_says_so_at_once(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path, processor: Callable[[str], None]
) -> None:
    processor("AVX2")
    command = ("compare", "digits", *TINY, "train.precision=bf16", "--out", tmp_path / "fair", "--seeds", 1)
    code, _, err = ddnn(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: train.precision=bf16: this processor has no instructions")
    assert not (tmp_path / "fair").exists()


def test_all_processes_have_the_precision_of_the_first(tiny: Callable[..., RunFolder]) -> None:
    auto = recipes.load("digits", AUTO)
    assert with_precision(auto, "bf16").train.precision == "bf16"
    explicit = recipes.load("digits", TINY)
    assert with_precision(explicit, "bf16") is explicit
    run = tiny("run")
    elsewhere = RunFolder(run.path, auto)  # as a process has it that did not make the folder
    train(elsewhere, Quiet())
    assert elsewhere.recipe.train.precision in ("float32", "bf16")


@pytest.mark.parametrize(("setting", "capability"), [("train.precision=bf16", "AVX2"), ("network.width=4", "AVX2")])
def test_a_training_says_so(
    ddnn: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    processor: Callable[[str], None],
    setting: str,
    capability: str,
) -> None:
    processor(capability)
    code, _, err = ddnn("train", *TINY, setting, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: train.")
