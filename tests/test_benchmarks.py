"""The scripts in `benchmarks/` whose figures the pages quote: they run as their first lines say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import step

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("given", "compiled"),
    [([], {"ekd"}), (["--json"], {"ekd"}), (["--compile-both"], {"ekd", "joint"}), (["--no-compile"], set())],
)
def test_what_the_step_benchmark_compiles(given: list[str], compiled: set[str]) -> None:
    assert set(step.parsed(given).compiling) == compiled


@pytest.mark.slow
def test_the_step_benchmark_prints_its_figures() -> None:
    """All but those of compiling, which takes a minute."""
    command = [sys.executable, "benchmarks/step.py", "--preset", "cifar-resnet8-14-20", "--json", "--no-compile"]
    made = subprocess.run([*command, "--seconds", "0"], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = json.loads(made.stdout)
    (figures,) = printed["presets"].values()
    missing = {figure for figure, value in figures.items() if value is None}
    assert missing == {"compiled_over_eager", "compiled_ekd_over_joint", "recompiles"}
    assert all(math.isfinite(value) and value > 0 for figure, value in figures.items() if figure not in missing)
    assert {"processor", "threads", "precision", "torch"} == printed["machine"].keys()
