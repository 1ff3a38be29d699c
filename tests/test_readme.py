"""What the README shows, works."""

import re
import shlex
from pathlib import Path

import pytest

from ddnn import cli, recipe
from ddnn.cli.training import _split
from ddnn.families import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """What is shown to be typed, and what is named in passing with its arguments."""
    pages = [README, *DOCS.values()]
    lines = [line.split("#")[0].strip() for page in pages for b in blocks("console", page) for line in b.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("ddnn ")] + [c for c in named() if c[2:]]


def named() -> list[list[str]]:
    found = [found for page in [README, *DOCS.values()] for found in re.findall(r"`(ddnn [^`]+)`", page)]
    return [shlex.split(line) for line in found]


def test_there_are_commands_and_code() -> None:
    assert len(commands()) > 5
    assert blocks("python")


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_understood(command: list[str]) -> None:
    """Verbs and options exist, recipes and overrides are valid; nothing is trained here."""
    import typer

    group = typer.main.get_command(cli.app)
    context = group.make_context("ddnn", command[1:], resilient_parsing=False)
    verb = group.commands[command[1]]  # type: ignore[attr-defined]
    inner = verb.make_context(command[1], command[2:], parent=context)
    if command[1] in ("train", "compare"):
        named, changes = _split(inner.params["recipe_and_overrides"], inner.params["overrides"])
        recipe.load(named[0] if named else "digits", changes)


def test_every_verb_named_in_passing_exists() -> None:
    import typer

    group = typer.main.get_command(cli.app)
    assert {command[1] for command in named()} <= set(group.commands)  # type: ignore[attr-defined]


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile, target


def test_every_preset_in_the_table_exists() -> None:
    table = README[README.index("| preset |") : README.index("ResNet-34 and ResNet-50 do not nest")]
    named = [name for name in re.findall(r"`([a-z0-9-]+)`", table) if not name.startswith("-")]
    assert named
    assert set(named) <= set(PRESETS)


def test_links_to_files_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name, page in DOCS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / "docs" / link).exists(), f"{name}: {link}"


@pytest.mark.parametrize("code", blocks("python", DOCS["runtime.md"]))
def test_what_the_page_on_devices_shows_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the small bundle of the tests; plain onnxruntime gives the class that ddnn gives."""
    import numpy as np
    from PIL import Image

    import bundles
    from ddnn.runtime import load

    monkeypatch.chdir(tmp_path)
    bundles.make(tmp_path / "bundle", resize=10)
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (21, 13, 3), dtype=np.uint8)).save("photo.jpg")
    exec(compile(code.replace("resnet18", "small"), "runtime.md", "exec"), {})
    if "import ddnn" not in code:
        assert capsys.readouterr().out.strip() == load("bundle").predict("photo.jpg", "small").classes[0][0]
