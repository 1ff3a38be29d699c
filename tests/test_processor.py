"""What a processor can't do is said before a training begins, instead of a wait of days or a crash."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import TINY
from ddnn.device import check_able
from ddnn.errors import RunError
from ddnn.families.cifar_resnet import resnet

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
    with pytest.raises(RunError, match=r"no instructions for it .* use that here"):
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
