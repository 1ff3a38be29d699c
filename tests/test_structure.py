"""Data flows one way, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddnn

SOURCE = Path(ddnn.__file__).parent

ORDER = [
    "version",
    "errors",
    "recipe",
    "data",
    "families",
    "network",
    "build",
    "objective",
    "evaluate",
    "branchwise",
    "cost",
    "device",
    "optimizer",
    "state",
    "checkpoint",
    "trained",
    "trainer",
    "compare",
    "report",
    "display",
    "cli",
    "__main__",
]
"""A module imports only from those before it."""


def imports(path: Path) -> set[str]:
    """The modules of ddnn, by their first name, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ddnn":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ddnn.")}
    return found - {"__version__"}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for other in imports(path):
        assert other in ORDER, f"{here} imports {other}, which has no place in the order"
        assert other == here or ORDER.index(other) < ORDER.index(here), f"{here} must not import {other}"


def test_importing_ddnn_is_light() -> None:
    code = "import ddnn, sys; print(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_everything_public_is_there_and_documented() -> None:
    for name in ddnn.__all__:
        thing = getattr(ddnn, name)
        assert name == "__version__" or thing.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nets'"):
        _ = ddnn.nets
