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
    "extras",
    "cpus",
    "memory",
    "timing",
    "wording",
    "launch",
    "processes",
    "preemption",
    "files",
    "figure",
    "page",
    "picture",
    "runtime",
    "policies",
    "recipe",
    "settings",
    "data",
    "proof",
    "families",
    "sharing",
    "table",
    "tied",
    "device",
    "energy",
    "autocast",
    "compiling",
    "network",
    "backbone",
    "objective",
    "build",
    "evaluate",
    "branchwise",
    "cost",
    "suggest",
    "optimizer",
    "state",
    "checkpoint",
    "trained",
    "export",
    "trainer",
    "compare",
    "report",
    "hub",
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


def test_asking_for_help_is_light() -> None:
    code = (
        "import sys; from ddnn import cli; sys.argv = ['ddnn', 'predict', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(any(m in sys.modules for m in ('torch', 'numpy', 'onnxruntime', 'PIL', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--latency-ms" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_a_ddnn_can_be_pickled_by_its_owner() -> None:
    """For multiprocessing; what comes from a disk is never unpickled."""
    import pickle

    import torch

    from ddnn.families import build

    for preset in ("cifar-resnet8-14-20", "resnet18-34"):
        full_net, table = build(preset, 5, width=4)
        net = ddnn.nest(full_net, table).eval()
        again = pickle.loads(pickle.dumps(net))
        x = torch.randn(1, 3, 32, 32)
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(net(x).values(), again(x).values(), strict=True))
        name = next(iter(net.depths))
        assert next(again.nets[name].parameters()) is next(again.nets[again.full_name].parameters())


def test_everything_public_is_there_and_documented() -> None:
    for name in ddnn.__all__:
        thing = getattr(ddnn, name)
        assert name == "__version__" or thing.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nets'"):
        _ = ddnn.nets
