"""Recipes: what is shipped parses, and every mistake says what, where and what is allowed."""

from pathlib import Path

import pytest

from ddnn.errors import RecipeError
from ddnn.recipe import Recipe, load, shipped


@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_recipe_parses_and_begins_with_its_description(name: str) -> None:
    load(name)
    first, second, *_ = shipped()[name].splitlines()
    assert first.startswith("# ")
    assert len(first) > 20
    assert second.startswith(f"# command:  ddnn train {'' if name == 'digits' else name}".rstrip())


def test_a_resolved_recipe_is_complete_and_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load("imagenet-resnet18-34", ["objective.subnet_weight.resnet18=0.5", "network.subnets.a=[1,1,1,1]"])
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert load(path) == recipe
    assert "momentum = 0.9" in path.read_text()  # a default, written out


def test_overrides_are_read_as_toml_or_text() -> None:
    recipe = load("digits", ["optim.lr=1", "data.source=some/folder", "train.compile=true", "optim.clip_norm=none"])
    assert recipe.optim.lr == 1.0
    assert recipe.data.source == "some/folder"
    assert recipe.train.compile is True
    assert recipe.optim.clip_norm is None


@pytest.mark.parametrize("override", ["augment.crop=none", "augment.policy=none", 'augment.crop="none"'])
def test_none_is_a_value_where_it_is_one(override: str) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load("digits", [override]), section), key) == "none"


def test_paths_that_are_there_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert load("digits", ["data.source=photos"]).data.source == str(tmp_path / "photos")
    assert load("digits", ["data.source=cifar100"]).data.source == "cifar100"
    assert load("digits", ["network.weights=w.pt"]).network.weights == tmp_path / "w.pt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.momentun=0.5", "optim.momentun: unknown key; did you mean momentum\\? allowed here: name, lr, mom"),
        ("optims.lr=0.5", "optims: unknown key; did you mean optim\\? allowed here: data, augment"),
        ("optim.name=rmsprop", "optim.name: input should be 'sgd' or 'adamw' \\(given: 'rmsprop'\\)"),
        ("optim.lr=fast", "optim.lr: input should be a valid number.* \\(given: 'fast'\\)"),
        ("optim.lr=-1", "optim.lr: input should be greater than 0 \\(given: -1\\)"),
        ("train.epochs=0", "train.epochs: input should be greater than or equal to 1"),
        ("train.accumulate=64", "batch_size=64 and accumulate=64 leave one image a part"),
        ("train.batch_size=1", "batch_size=1 is one image a part, too few for batch norm"),
        ("network.subnets={a=2}", r"1 mistake\n  network.subnets.a: .* tuple, or .* dictionary \(given: 2\)$"),
        ("train={compile=true, lean=true}", "compile=true and lean=true exclude each other"),
        ("train.accumulate=3", "train: accumulate=3 does not divide batch_size=64"),
        ("objective.subnet_weight=-1", "objective.subnet_weight: input should be greater than or equal to 0"),
        (
            "objective.kl=-1",
            "recipe digits: 1 mistake\n  objective.kl: input should be greater than or equal to 0 .given: -1.",
        ),
        ("objective.kl.a=-1", "recipe digits: 1 mistake\n  objective.kl.a: input should be greater than or equal to 0"),
        ("objective.attention=much", "1 mistake\n  objective.attention: input should be a valid number"),
        ("network.subnets.a=[1,0]", "network.subnets.a.1: input should be greater than or equal to 1"),
        ("schedule.warmup_epochs=99", "schedule.warmup_epochs=99 must be below train.epochs=30"),
        ("optim.momentum=0.0", "nesterov needs momentum above 0"),
        ("objective.ramp=[0.8,0.2]", "objective: ramp=\\[0.8, 0.2\\] ends before it begins"),
        ("optim=3", "optim: input should be a valid dictionary"),
        ("optim.lr", "override 'optim.lr' is not of the form section.key=value"),
        ("optim.lr.peak=3", "optim.lr: input should be a valid number|lr holds a value"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("digits", [override])


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[optim]\nlr = "x"\nmomentun = 1\n[train]\nepochs = -1\n')
    with pytest.raises(RecipeError) as error:
        load(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: 3 mistakes"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["optim.lr", "optim.momentun", "train.epochs"]


def test_no_such_recipe_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe digit: No such file.*; give a TOML file or one of: .*digits"):
        load("digit")
    bad = tmp_path / "bad.toml"
    bad.write_text("optim = [")
    with pytest.raises(RecipeError, match=r"bad.toml is not valid TOML: Invalid value"):
        load(bad)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load(binary)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.epochs = 3
