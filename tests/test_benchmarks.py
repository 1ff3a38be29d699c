"""What the scripts in `benchmarks/` do by default; their figures take too long to be made here."""

import pytest
from benchmarks import step


@pytest.mark.parametrize(
    ("given", "compiled"),
    [([], {"ekd"}), (["--json"], {"ekd"}), (["--compile-both"], {"ekd", "joint"}), (["--no-compile"], set())],
)
def test_what_the_step_benchmark_compiles(given: list[str], compiled: set[str]) -> None:
    assert set(step.parsed(given).compiling) == compiled
