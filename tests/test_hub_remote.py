"""What goes to the hub and comes from it, without a network: a stand-in for its API, and its own cache on the disk."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import ddnn
from conftest import TINY, Quiet
from ddnn import cli, recipe
from ddnn.checkpoint import RunFolder
from ddnn.errors import HubError
from ddnn.families.cifar_resnet import resnet
from ddnn.hub import Network, load_config, save_run, upload
from ddnn.network import DDNN, nest
from ddnn.trained import load_trained
from ddnn.trainer import train

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", recipe.load("digits", TINY))
    train(run, Quiet())
    return run


def make() -> DDNN:
    torch.manual_seed(0)
    return nest(resnet(20, num_classes=5, width=4), {"resnet8": (1, 1, 1)}).eval()


class Hub:
    """Takes what it is sent, as the hub's API does."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.refusal: Exception | None = None

    def __call__(self, token: str | bool | None = None) -> "Hub":  # stands for HfApi(token=...)
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.refusal:
            raise self.refusal
        assert exist_ok
        owner = repo_id if "/" in repo_id else f"someone/{repo_id}"
        self.repositories.setdefault(owner, {"private": private, "files": {}})

        class Made(str):
            repo_id = owner

        return Made(f"https://huggingface.co/{owner}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **about: Any) -> None:
        sent = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.name in allow_patterns}
        self.repositories[repo_id]["files"] |= sent
        self.repositories[repo_id] |= about


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", stand_in)
    return stand_in


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, bytes]], None]:
    """Put a repository into an empty cache, and let the hub be out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(repo_id: str, files: dict[str, bytes]) -> None:
        place = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        (place / "snapshots" / COMMIT).mkdir(parents=True)
        for name, content in files.items():
            (place / "snapshots" / COMMIT / name).write_bytes(content)

    return put


def test_what_is_pushed_comes_back_by_its_id(
    hub: Hub, cached: Callable[[str, dict[str, bytes]], None], tmp_path: Path
) -> None:
    net = make()
    address = ddnn.push_to_hub(
        net,
        "someone/nested",
        private=True,
        token="secret",
        network=Network(name="cifar/resnet20", width=4),
        license="mit",
    )
    assert address == "https://huggingface.co/someone/nested"
    repository = hub.repositories["someone/nested"]
    assert repository["private"] is True
    assert hub.token == "secret"
    assert set(repository["files"]) == {"model.safetensors", "config.json", "README.md"}
    card = ModelCard(repository["files"]["README.md"].decode())
    assert card.data.license == "mit"
    assert 'ddnn.from_pretrained("someone/nested")' in card.content
    assert not any(b"secret" in content for content in repository["files"].values())

    cached("someone/nested", repository["files"])
    x = torch.randn(2, 3, 16, 16)
    again = ddnn.from_pretrained("someone/nested")
    assert all(torch.equal(output.logits, again(x)[name].logits) for name, output in net(x).items())
    assert load_config("someone/nested", revision="main").network == Network(name="cifar/resnet20", width=4)


def test_a_repository_without_a_model_is_named(cached: Callable[[str, dict[str, bytes]], None]) -> None:
    cached("someone/else", {"config.json": json.dumps({"model_type": "vit"}).encode()})
    with pytest.raises(HubError, match="no model of that id can be had from the Hugging Face hub"):
        ddnn.from_pretrained("someone/else")  # offline, nothing tells whether it has weights
    with pytest.raises(HubError, match="holds no model of ddnn but one of transformers, vit"):
        load_config("someone/else")


def test_only_the_models_files_are_sent(hub: Hub, finished: RunFolder, tmp_path: Path) -> None:
    save_run(finished, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    upload(tmp_path, "nested")
    assert set(hub.repositories["someone/nested"]["files"]) == {"model.safetensors", "config.json", "README.md"}


def test_refusals_end_in_a_sentence(hub: Hub, finished: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"holds no model to send: it has no model.safetensors"):
        upload(tmp_path, "someone/nested")
    hub.refusal = OSError("401 Client Error.\nlong story")
    with pytest.raises(HubError, match=r"did not take .* as someone/nested \(.*401 Client Error") as caught:
        ddnn.push_to_hub(make(), "someone/nested")
    assert "hf auth login" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_ddnn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddnn", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


def test_hub_writes_and_push_sends(
    run_ddnn: Callable[..., tuple[int, str, str]], hub: Hub, finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    code, printed, _ = run_ddnn("hub", finished.path, "-o", out, "--license", "apache-2.0")
    assert code == 0
    assert "README.md, config.json, model.safetensors" in printed
    x = torch.randn(2, 3, 8, 8)
    net, again = load_trained(finished)[0], ddnn.from_pretrained(out)
    assert all(torch.equal(o.logits, again(x)[name].logits) for name, o in net(x).items())

    for source, name in ((finished.path, "someone/a"), (out, "someone/b")):
        code, printed, _ = run_ddnn("push", source, name, "--private")
        assert (code, printed.strip()) == (0, f"https://huggingface.co/{name}")
        assert hub.repositories[name]["private"] is True
    a, b = (hub.repositories[name]["files"] for name in ("someone/a", "someone/b"))
    assert a["model.safetensors"] == b["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert b'from_pretrained("someone/a")' in a["README.md"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("hub", "/nowhere", "-o", "x"), 1, "error: /nowhere is no run folder"),
        (("hub", "RUN", "-o", "x", "--architecture", "resnet18"), 2, "--architecture goes with --subnet"),
        (("hub", "RUN", "-o", "x", "--comparison", "/nowhere"), 1, "error: /nowhere is no comparison"),
        (("push", "/nowhere", "a/b"), 1, "error: /nowhere is no run folder"),
    ],
)
def test_mistakes_end_in_a_sentence(
    run_ddnn: Callable[..., tuple[int, str, str]],
    finished: RunFolder,
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    got, _, err = run_ddnn(*(finished.path if a == "RUN" else a for a in arguments))
    assert got == code
    assert sentence in err
    assert "Traceback" not in err
