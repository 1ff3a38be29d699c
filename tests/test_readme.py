"""What the README shows, works."""

import re
import shlex
from pathlib import Path

import pytest

from ddnn import cli, recipe
from ddnn.cli.training import _split
from ddnn.families import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("console") for line in block.splitlines()]
    inline = re.findall(r"`(ddnn [^`]+)`", README)
    return [shlex.split(line) for line in [*lines, *inline] if line.startswith("ddnn ")]


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
        assert (Path(__file__).parents[1] / link).exists(), link
