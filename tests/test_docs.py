"""What the pages in docs/ show, works: their code, their commands, their links."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY, Quiet
from ddnn import cli, recipe
from ddnn.checkpoint import RunFolder
from ddnn.trainer import train
from test_examples import commands as commands_of_examples

ROOT = Path(__file__).parents[1]
PAGES = ["data.md", "loops.md", "hub.md", "backbones.md", "families.md", "many.md", "recipe.md"]


def text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "console") for line in block.splitlines()]


def run_code(page: str) -> dict[str, Any]:
    """All Python on a page, from top to bottom; what it leaves behind."""
    scope: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), scope)
    return scope


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", text(page)):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_examples_are_those_that_are_tested(page: str) -> None:
    tested = {command for _, command in commands_of_examples()}
    shown = {command for command in commands(page) if "examples/" in command}
    assert shown <= tested
    if page == "loops.md":
        assert shown == tested - {"python examples/detection.py"}


def test_the_page_of_settings_is_what_the_code_says(ddnn: Callable[..., tuple[int, str, str]]) -> None:
    assert ddnn("recipes", "--settings") == (0, text("recipe.md"), "")
    told = re.findall(r"^\| `(\w+\.\w+)` \| .* \| (.+) \|$", text("recipe.md"), flags=re.MULTILINE)
    every = [f"{section}.{key}" for section, keys in recipe.Recipe().model_dump().items() for key in keys]
    assert [key for key, _ in told] == every  # none without a meaning


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page: str) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"pip install\s+'\.\[(\w+)\]'", text(page)):
        assert extra in extras


def test_loops() -> None:
    scope = run_code("loops.md")
    assert all(p.grad is not None for p in scope["net"].parameters())


def test_backbones() -> None:
    scope = run_code("backbones.md")
    backbone, images = scope["backbone"], scope["images"]
    assert (backbone.channels, backbone.strides) == ((128, 256, 512), (8, 16, 32))  # as its comments say
    assert [list(f.shape) for f in backbone(images, "resnet18")][:2] == [[2, 128, 8, 12], [2, 256, 4, 6]]
    assert list(scope["maps"]) == ["layer2", "layer3", "layer4"]
    assert scope["masks"].shape == (2, 21, 64, 96)
    import torchvision

    inline = re.search(r"`BackboneWithFPN\((.*?)\)`", text("backbones.md"), flags=re.DOTALL)
    assert inline is not None
    extracted = eval(f"BackboneWithFPN({inline[1]})", {**scope, **vars(torchvision.models.detection.backbone_utils)})
    assert extracted(images)["0"].shape == (2, 32, 8, 12)


def test_families() -> None:
    scope = run_code("families.md")
    assert scope["net"].stages == ("stage1", "stage2")
    assert scope["net"].depths == {"small": (1, 2), "full": (3, 5)}


@pytest.mark.slow
def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands one after the other, but that the training is a short one; then its code."""
    pytest.importorskip("timm", reason="timm is not installed: pip install 'ddnn[examples]'")
    monkeypatch.chdir(tmp_path)
    sent: dict[str, str] = {}
    monkeypatch.setattr("ddnn.hub.upload", lambda folder, repo_id, private: sent.setdefault(repo_id, str(folder)))
    first, *others = map(shlex.split, commands("hub.md"))
    assert first == ["ddnn", "train", "digits", "--out", "runs/digits"]
    train(RunFolder.create(Path("runs/digits"), recipe.load("digits", TINY)), Quiet())
    for command in others:
        call(command, monkeypatch)
    assert sent == {"someone/digits": "digits-model"}
    scope = run_code("hub.md")
    assert list(scope["again"].depths) == ["resnet18", "resnet34"]
    assert json.loads(Path("pets-18/config.json").read_text())["architecture"] == "resnet18"


def test_verbs_shown_in_passing_are_understood() -> None:
    import typer

    group = typer.main.get_command(cli.app)
    context = group.make_context("ddnn", ["recipes"])
    for page in PAGES:
        for command in re.findall(r"`(ddnn [^`]+)`", text(page)):
            _, verb, *arguments = shlex.split(command)
            assert verb in group.commands, command  # type: ignore[attr-defined]
            if arguments:
                group.commands[verb].make_context(verb, arguments, parent=context)  # type: ignore[attr-defined]


def call(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code, command
