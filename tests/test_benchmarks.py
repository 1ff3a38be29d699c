"""What the scripts in `benchmarks/` do by default; their figures take too long to be made here."""

import pytest
import torch
from benchmarks import step


@pytest.mark.parametrize(
    ("given", "compiled"),
    [([], {"ekd"}), (["--json"], {"ekd"}), (["--compile-both"], {"ekd", "joint"}), (["--no-compile"], set())],
)
def test_what_the_step_benchmark_compiles(given: list[str], compiled: set[str]) -> None:
    assert set(step.parsed(given).compiling) == compiled


@pytest.mark.parametrize(
    ("given", "fast", "precision"),
    [([], True, "bf16"), ([], False, "float32"), (["--precision", "bf16"], False, "bf16")],
)
def test_precision_is_what_the_processor_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, given: list[str], fast: bool, precision: str
) -> None:
    monkeypatch.setattr(step, "has_bf16", lambda device: fast)
    assert step.precision_of(step.parsed(given), torch.device("cpu")) == precision
