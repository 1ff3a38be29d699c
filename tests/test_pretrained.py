"""Starting from a network that is trained already: a run, a file, or what a library downloads."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from benchmarks import pretrained
from safetensors.torch import save_file
from torch import Tensor

from conftest import Quiet
from ddnn import recipe
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.errors import RecipeError
from ddnn.families.library import create
from ddnn.recipe import Network
from ddnn.trainer import train

TINY = ["network.width=8", "data.validation=0.2", "data.limit=200", "train.epochs=2", "train.batch_size=64"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    out = tmp_path_factory.mktemp("runs")
    assert pretrained.main(["digits", *TINY, "--out", str(out), "--epochs", "2"]) == 0
    return out, json.loads((out / "pretrained.json").read_text())["nets"]


@pytest.mark.slow
def test_sub_nets_of_a_good_network_need_few_epochs(tmp_path: Path) -> None:
    """Four epochs after the full-net was trained, against eight from scratch."""
    recipe_ = ["digits", "network.width=8", "data.validation=0.2", "train.epochs=8"]
    pretrained.main([*recipe_, "--out", str(tmp_path), "--epochs", "4"])
    nets = json.loads((tmp_path / "pretrained.json").read_text())["nets"]
    assert nets["resnet20"]["alone"] > 0.95
    assert nets["resnet20"]["nested"][-1] > nets["resnet20"]["alone"] - 0.03  # what the full-net keeps
    for name in ("resnet8", "resnet14"):
        assert nets[name]["nested"][-1] > nets[name]["alone"] - 0.03, name


def test_the_comparison_says_what_its_runs_say(measured: tuple[Path, dict[str, dict[str, object]]]) -> None:
    out, nets = measured
    curve = RunFolder.open(out / "nested").metrics()
    table = pretrained.table(json.loads((out / "pretrained.json").read_text()))
    for name, net in nets.items():
        assert [epoch["validation"][name]["top1"] for epoch in curve] == net["nested"]
        alone = RunFolder.open(out / f"alone-{name}").metrics()
        assert alone[-1]["validation"][name]["top1"] == net["alone"]
        reached = [i + 1 for i, top1 in enumerate(net["nested"]) if top1 >= net["alone"]]
        assert net["reached"] == (reached[0] if reached else None)
        assert (
            f"| {100 * net['nested'][1]:.2f} | {f'{reached[0]} of 2 epochs' if reached else 'not reached'} |" in table
        )
    chosen = RunFolder.open(out / "nested").recipe
    assert chosen.network.weights == chosen.objective.teacher == (out / "alone-resnet20").resolve()


def test_a_run_gives_its_full_net(measured: tuple[Path, dict[str, dict[str, object]]]) -> None:
    """The folder and its file say the same; shared and private tensors all begin as the trained full-net's."""
    out, _ = measured
    for weights in (out / "alone-resnet20", out / "alone-resnet20" / "model.safetensors"):
        net = build(Network(width=8, weights=weights), 10)
        trained = build(RunFolder.open(out / "alone-resnet20").recipe.network.unweighted(), 10)
        run = RunFolder.open(out / "alone-resnet20")
        run.load_weights(trained, run.read_json("summary.json")["weights_sha256"])
        expected = trained.nets["resnet20"].state_dict()
        for name, sub in net.nets.items():
            assert all(torch.equal(tensor, expected[k]) for k, tensor in sub.state_dict().items()), name
    joint = build(Network(width=8, weights=out / "nested"), 10)  # of all its nets, the full-net
    assert not torch.equal(joint.nets["resnet20"].fc.weight, net.nets["resnet20"].fc.weight)


def test_another_runs_network_is_refused(measured: tuple[Path, dict[str, dict[str, object]]], tmp_path: Path) -> None:
    out, _ = measured
    with pytest.raises(
        RecipeError, match=r"holds a run's nets, resnet8 .*, and not one that is this recipe's full-net"
    ):
        build(Network(width=8, weights=out / "alone-resnet8"), 10)
    with pytest.raises(RecipeError, match=r"is of another network: it holds .*of shape \(8.*\(16"):
        build(Network(width=16, weights=out / "alone-resnet20"), 10)
    with pytest.raises(RecipeError, match="is no folder of a finished run: it has no model"):
        build(Network(weights=tmp_path), 10)


def test_a_head_for_other_classes_is_refused_or_fresh(measured: tuple[Path, dict[str, dict[str, object]]]) -> None:
    weights = measured[0] / "alone-resnet20"
    with pytest.raises(
        RecipeError, match=r"trained for another number of classes: it holds fc.* network.fresh_classifier"
    ):
        build(Network(width=8, weights=weights), 3)
    net = build(Network(width=8, weights=weights, fresh_classifier=True), 3).nets["resnet20"]
    old = build(Network(width=8, weights=weights), 10).nets["resnet20"]
    assert net.fc.weight.shape == (3, 32)
    assert torch.equal(net.conv1.weight, old.conv1.weight)
    assert torch.equal(net.layer3[2].bn2.running_mean, old.layer3[2].bn2.running_mean)
    as_many = build(Network(width=8, weights=weights, fresh_classifier=True), 10).nets["resnet20"]
    assert not torch.equal(as_many.fc.weight, old.fc.weight), "of other classes, though there are as many"
    assert torch.equal(as_many.conv1.weight, old.conv1.weight)


def test_a_head_for_other_classes_where_stages_are_named(tmp_path: Path) -> None:
    """Of a network whose stages can't be found."""
    named = {"name": "torchvision/alexnet", "stages": ("features[8:12:2]",)}
    torch.save(torchvision.models.alexnet(num_classes=7).state_dict(), tmp_path / "alexnet.pt")
    with pytest.raises(RecipeError, match=r"trained for another number of classes: it holds classifier\.6"):
        build(Network(**named, weights=tmp_path / "alexnet.pt"), 3)
    net = build(Network(**named, weights=tmp_path / "alexnet.pt", fresh_classifier=True), 3)
    assert net.nets[net.full_name].classifier[6].weight.shape == (3, 4096)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("torchvision/mobilenet_v3_small", "classifier.3"),
        ("timm/convnext_atto", "head.fc"),
        ("torchvision/densenet121", "classifier"),
    ],
)
def test_the_classifier_of_any_family_is_known(name: str, classifier: str, tmp_path: Path) -> None:
    trained = create(name, num_classes=7)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    network = Network(name=name, weights=tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match=f"another number of classes: it holds {classifier}"):
        build(network, 3)
    net = build(network.model_copy(update={"fresh_classifier": True}), 3)
    loaded = net.nets[net.full_name]
    assert loaded.get_submodule(classifier).weight.shape[0] == 3
    same = [
        torch.equal(t, loaded.state_dict()[k]) for k, t in trained.state_dict().items() if not k.startswith(classifier)
    ]
    assert all(same)


def test_torchvisions_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As downloaded, here from a stand-in for the server; a classifier for other classes is fresh."""
    torch.manual_seed(3)
    state = torchvision.models.resnet18().state_dict()
    asked: list[str] = []

    def download(url: str, **_: object) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    net = build(Network(name="torchvision/resnet18", pretrained=True, subnets={"small": (1, 1, 1, 1)}), 3)
    assert asked[0].startswith("https://download.pytorch.org/models/resnet18-")
    assert torch.equal(net.nets["resnet18"].layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert torch.equal(net.nets["small"].layer2[0].bn1.weight, state["layer2.0.bn1.weight"])
    assert net.nets["resnet18"].fc.out_features == 3
    whole = build(Network(name="torchvision/resnet18", pretrained=True), 1000)
    assert torch.equal(whole.nets["resnet18"].fc.weight, state["fc.weight"])


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    state = timm.create_model("test_vit").state_dict()
    asked: list[str] = []

    def download(model_id: str, *_: object, **__: object) -> dict[str, Tensor]:
        asked.append(model_id)
        return state

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    network = Network(
        name="timm/test_vit", pretrained=True, options={"dynamic_img_size": False}, subnets={"small": (3,)}
    )
    net = build(network, 3)
    assert asked == ["timm/test_vit.r160_in1k"]
    assert torch.equal(net.nets["test_vit"].blocks[5].mlp.fc1.weight, state["blocks.5.mlp.fc1.weight"])
    assert net.nets["small"].blocks[2].mlp.fc1.weight is net.nets["test_vit"].blocks[2].mlp.fc1.weight
    assert net.nets["test_vit"].head.out_features == 3


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    sentence = r"cannot get the weights of resnet18 \(OSError: Name or service not known\); with a file of them, give"
    with pytest.raises(RecipeError, match=sentence):
        build(Network(name="torchvision/resnet18", pretrained=True), 3)
    with pytest.raises(RecipeError, match="torchvision has no resnet26, and so no weights of it"):
        build(Network(name="torchvision/resnet26", pretrained=True), 3)
    with pytest.raises(RecipeError, match="there are no weights of cifar/resnet20; give network"):
        build(Network(pretrained=True), 3)


@pytest.mark.slow
def test_a_resumed_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    changes = ["network.name=torchvision/resnet18", "network.pretrained=true", "network.subnets.small=[1,1,1,1]"]
    quick = ["data.limit=32", "train.epochs=1", "train.batch_size=16", "train.checkpoint_minutes=0"]
    run = RunFolder.create(tmp_path / "run", recipe.load("digits", [*changes, *quick]))
    summary = train(run, Quiet())
    (run.path / "summary.json").unlink()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    assert train(run, Quiet())["subnets"]["small"]["top1"] == summary["subnets"]["small"]["top1"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["network.pretrained=true", "network.weights=w.pt"],
            "pretrained=true and weights both say what to start from",
        ),
        (["network.fresh_classifier=true"], "fresh_classifier=true is about weights; give weights=FILE"),
        (["network.options.depth=[[1]]"], "network.options.depth"),
    ],
)
def test_contradictions(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipe.load("digits", overrides)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("timm/resnet19", {}, "timm has no network 'resnet19'; did you mean timm/resnet18"),
        ("torchvision/resnet19", {}, "torchvision has no network 'resnet19'; did you mean torchvision/resnet18"),
        ("cifar/resnet21", {}, "cifar has no network 'resnet21'; did you mean cifar/resnet32, cifar/resnet20"),
        ("keras/resnet18", {}, "no network 'keras/resnet18'; cifar/resnetN, torchvision/NAME and timm/NAME"),
        ("timm/resnet18", {"depth": 3}, "timm/resnet18 can't be made as asked for: .*'depth'"),
        ("torchvision/resnet18", {"depth": 3}, "torchvision/resnet18 can't be made as asked for: .*'depth'"),
    ],
)
def test_names_and_options_that_are_not_there(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        build(Network(name=name, options=options), 3)


def test_a_name_without_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"timm/resnet18 needs timm; install it with: pip install 'ddnn\[timm\]'"):
        create("timm/resnet18", num_classes=3)


def test_images_too_small_for_a_network() -> None:
    with pytest.raises(RecipeError, match=r"torchvision/vgg11 can't run on images of 16 px: .*; data.image_size sets"):
        build(Network(name="torchvision/vgg11"), 3, 16)
