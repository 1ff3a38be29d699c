"""Bundles: every graph is the network, weights are stored once, a mistake writes nothing."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import ddnn
from ddnn.errors import ExportError
from ddnn.evaluate import macs, parameters
from ddnn.export import About, bundle, export_bundle
from ddnn.export import manifest as manifests
from ddnn.export.parts import Feature, Part, parts
from ddnn.export.quiet import quiet
from ddnn.export.weights import Weights
from ddnn.families import build
from ddnn.network import DDNN
from ddnn.runtime import load
from nets import cascade, images, run, shaken, small

ABOUT = About(classes=("v", "w", "x", "y", "z"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize=18)


@pytest.fixture(scope="module")
def net() -> DDNN:
    return small()


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """What `folder` fills: the traced graphs, by name of the net; tracing takes seconds."""
    return {}


@pytest.fixture(scope="module")
def folder(net: DDNN, traced: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    trace = bundle._traced

    def keep(net: DDNN, part: Part, image: torch.Tensor) -> Any:
        traced[part.name] = trace(net, part, image)
        return traced[part.name]

    about = About(**{**vars(ABOUT), "accuracy": {"a": {"top1": 0.5, "top5": 1.0}}, "source": {"dataset": "none"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_traced", keep)
        export_bundle(net, path, images(), about)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def agree(got: np.ndarray, expected: torch.Tensor) -> None:
    tolerance = 1e-4 * expected.abs().max().item()
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=tolerance)


def holds(folder: Path, net: DDNN, size: int) -> None:
    """The laws of every bundle, read by its manifest and plain onnxruntime."""
    manifest = json.loads((folder / "manifest.json").read_text())
    x = images(3, size)
    with torch.no_grad():
        expected = {name: output.logits for name, output in net(x).items()}
    assert [entry["name"] for entry in manifest["nets"]] == list(net.depths)
    chain = cascade(folder, manifest, x.numpy())
    for entry in manifest["nets"]:
        name = entry["name"]
        agree(run(folder / entry["graph"], images=x.numpy())["logits"], expected[name])
        agree(chain[name], expected[name])
        assert entry["macs"] == macs(net.nets[name], size)
        assert entry["params"] == parameters(net.nets[name])
        assert entry["depths"] == list(net.depths[name])
    assert sum(entry["cascade"]["macs"] for entry in manifest["nets"]) == macs(net, size)  # nothing twice
    stored_once(folder, net)


def stored_once(folder: Path, net: DDNN) -> None:
    content = (folder / "weights.bin").read_bytes()
    tensors = {t.numpy().tobytes() for t in net.state_dict().values() if t.is_floating_point()}
    for tensor in tensors:
        assert content.count(tensor) == 1
    padded = sum(len(t) + -len(t) % 64 + (4096 if len(t) >= 2**20 else 0) for t in tensors)
    assert len(content) <= padded
    in_graphs = sum(
        len(tensor.raw_data)
        for path in folder.glob("*.onnx")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    )
    assert in_graphs < 1000  # shapes


def test_a_bundle_is_its_network(folder: Path, net: DDNN) -> None:
    holds(folder, net, 16)


def test_a_cascade_starts_where_paths_part(manifest: dict[str, Any]) -> None:
    steps = [entry["cascade"] for entry in manifest["nets"]]
    assert [step["inputs"] for step in steps] == [{"images": "images"}, {"from_a": "a.1"}, {"from_b": "b.3"}]
    assert [step["outputs"] for step in steps] == [{"at_1": "a.1"}, {"at_3": "b.3"}, {}]


def test_a_part_starts_at_what_the_first_net_on_its_path_made() -> None:
    """c leaves b's path where a has left it long before: at a block that a ran."""
    depths = {"a": (2, 1, 1), "b": (2, 2, 1), "c": (1, 3, 3)}
    divisible = SimpleNamespace(whole=None)
    anatomies: Any = {name: SimpleNamespace(depths=kept, family=divisible) for name, kept in depths.items()}
    net = DDNN({name: nn.Identity() for name in depths}, anatomies, "shared", "shared")
    assert parts(net) == [
        Part("a", None, (Feature("a", 1), Feature("a", 3))),
        Part("b", Feature("a", 3), ()),
        Part("c", Feature("a", 1), ()),
    ]


@pytest.mark.slow
def test_nets_that_share_no_work_run_from_the_images(tmp_path: Path) -> None:
    net = small()
    for name, one in net.nets.items():
        net.anatomies[name] = net.anatomies[name].as_if(one, whole="for this test")
    assert parts(net) == [Part(name, None, ()) for name in net.depths]
    export_bundle(net, tmp_path / "bundle", images(), ABOUT)
    holds(tmp_path / "bundle", net, images().shape[-1])


def test_any_number_of_images_runs(folder: Path, net: DDNN) -> None:
    for n in (1, 2, 5):
        x = images(n)
        with torch.no_grad():
            agree(run(folder / "b.onnx", images=x.numpy())["logits"], net.nets["b"](x))


def test_the_manifest_says_what_is_there(folder: Path, manifest: dict[str, Any]) -> None:
    assert manifest["format"] == "ddnn-bundle"
    assert manifest["version"] == 1
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    expected = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }
    assert manifest["files"] == expected
    assert set(files) == {f"{n}{kind}.onnx" for n in "abc" for kind in ("", ".cascade")} | {"weights.bin"}
    assert manifest["input"] == {
        "size": 16, "resize": 18, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
        "channels": 3, "interpolation": "bilinear",
    }  # fmt: skip
    assert manifest["classes"] == ["v", "w", "x", "y", "z"]
    assert (manifest["norm"], manifest["precision"]) == ("private", "float32")
    assert manifest["source"] == {"dataset": "none"}
    assert manifest["versions"]["onnxruntime"]
    first = manifest["nets"][0]
    assert (first["top1"], first["top5"]) == (0.5, 1.0)
    assert first["parity"]["images"] == 4
    assert first["parity"]["top1_agreement"] == 1
    assert 0 <= first["parity"]["max_abs"] <= first["parity"]["tolerance"]


def test_graphs_are_valid_and_keep_their_norms(folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
        assert operators.count("BatchNormalization") >= operators.count("Conv")
        assert set(operators) <= {"Conv", "BatchNormalization", "Relu", "Add", "GlobalAveragePool", "Reshape", "Gemm"}


def test_the_same_name_is_the_same_tensor_in_all_graphs(folder: Path) -> None:
    places: dict[str, set[tuple[str, ...]]] = {}
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.external_data:
                places.setdefault(tensor.name, set()).add(tuple(entry.value for entry in tensor.external_data))
    assert all(len(each) == 1 for each in places.values())
    assert "layer1.0.conv1.weight" in places
    assert "a/layer2.0.bn1.weight" in places


def test_plain_onnxruntime_runs_it_without_ddnn(folder: Path, net: DDNN) -> None:
    code = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(folder / 'c.onnx')!r})\n"
        "x = numpy.linspace(-1, 1, 3 * 16 * 16, dtype='float32').reshape(1, 3, 16, 16)\n"
        "print(session.run(None, {'images': x})[0].tolist(), 'ddnn' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logits, _, imported = done.stdout.strip().rpartition(" ")
    assert imported == "False"
    with torch.no_grad():
        agree(np.array(json.loads(logits)), net.nets["c"](torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)))


def test_the_runtime_loads_it(folder: Path, net: DDNN) -> None:
    model = load(folder)
    x = images(2)
    with torch.no_grad():
        for name in net.depths:
            agree(model(x.numpy(), depth=name), net.nets[name](x))


def refused(net: DDNN, tmp_path: Path, sentence: str, x: torch.Tensor | None = None, about: About = ABOUT) -> None:
    with pytest.raises(ExportError, match=sentence):
        export_bundle(net, tmp_path / "bundle", images() if x is None else x, about)
    assert list(tmp_path.iterdir()) == []


def test_what_was_never_calibrated_is_refused(tmp_path: Path) -> None:
    refused(small("recalibrated"), tmp_path, "statistics of a, b were never calibrated")


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"classes": range(5)}, "class names are texts without control characters, not 0"),
    ({"classes": ("v", "w", "x", "y", "z\n")}, r"class names are texts without control characters, not 'z\\n'"),
    ({"classes": "vwxyz"}, "classes is a list of names, not 'vwxyz'"),
    ({"classes": None}, "classes is a list of names, not None"),
    ({"accuracy": {"a": 0.5}}, "the accuracy of a is top1, top5 and validation, not 0.5"),
    ({"accuracy": {"a": {"validation": 0.5}}}, "the accuracy of a is top1, top5 and validation, not 0.5"),
    ({"std": (0.5, 0.5, float("nan"))}, "std above 0, not std=.*nan"),
    ({"mean": (0.5, float("inf"), 0)}, "not mean=.*inf"),
    ({"mean": 0.5}, "not mean=0.5"),
    ({"resize": 18.5}, "resize=18.5 is no whole number of pixels"),
    ({"resize": 10_000}, "resize=10000 is more than the 8192 pixels"),
    ({"accuracy": {"a": {"top1": 57.0}}}, "the top1 of a is 57.0; it is a share from 0 to 1"),
    ({"accuracy": {"a": {"validation": {"top5": float("nan")}}}}, "the top5 of a is nan"),
    ({"accuracy": {"a": {"top1": "much"}}}, "the top1 of a is 'much'"),
    ({"accuracy": {"a": {"name": "b"}}}, "the accuracy of a is top1, top5 and validation, not 'name'"),
    ({"accuracy": {"q": {"top1": 0.5}}}, "an accuracy is given of 'q', which is no net; there are a, b, c"),
    ({"source": {"loss": float("nan")}}, "source can't be written as JSON"),
    ({"source": {"net": object()}}, "source can't be written as JSON"),
]


def test_mistakes_are_found_before_anything_is_traced(net: DDNN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_traced", lambda *_: pytest.fail("it traces"))
    for change, sentence in MISTAKES:
        with pytest.raises(ExportError, match=sentence):
            manifests.check(net, About(**{**vars(ABOUT), **change}), images())


def test_arrays_and_tensors_are_numbers_too(net: DDNN) -> None:
    given = {
        "classes": np.array(ABOUT.classes),
        "mean": np.array(ABOUT.mean),
        "std": torch.tensor([0.25, 0.5, 0.5]),
        "resize": np.int64(18),
        "accuracy": {"a": {"top1": np.float32(0.5), "top5": torch.tensor(1.0)}},
    }
    about = manifests.check(net, About(**given), images())
    assert about == About(ABOUT.classes, ABOUT.mean, (0.25, 0.5, 0.5), 18, {"a": {"top1": 0.5, "top5": 1.0}}, {})
    assert {type(each) for each in (*about.mean, *about.std)} == {float}
    assert type(about.resize) is int


def test_mistakes_end_in_a_sentence(tmp_path: Path) -> None:
    refused(small().train(), tmp_path, r"in eval mode; call net.cpu\(\).eval\(\) before")
    few = About(**{**vars(ABOUT), "classes": ("v", "w")})
    refused(small(), tmp_path, "2 class names are given for the 5 outputs", about=few)
    twice = About(**{**vars(ABOUT), "classes": ("v", "w", "x", "y", "v")})
    refused(small(), tmp_path, "two classes have the same name", about=twice)
    refused(small(), tmp_path, "std above 0", about=About(**{**vars(ABOUT), "std": (0.5, 0.5, 0)}))
    refused(small(), tmp_path, "resize=15 is less than the 16", about=About(**{**vars(ABOUT), "resize": 15}))
    refused(small(), tmp_path, r"at least 2, not float32 \[1, 3, 16, 16\]", x=images(1))
    refused(small(), tmp_path, r"not float64 \[4, 3, 16, 16\]", x=images().double())


def test_an_existing_target_is_left_alone(net: DDNN, tmp_path: Path) -> None:
    for name, make in (("file", Path.touch), ("folder", Path.mkdir)):
        target = tmp_path / name
        make(target)
        if target.is_dir():
            (target / "mine").touch()
        with pytest.raises(ExportError, match="exists already and is not overwritten"):
            export_bundle(net, target, images(), ABOUT)
    assert (tmp_path / "folder" / "mine").exists()


def test_a_graph_that_differs_from_the_network_is_not_written(
    net: DDNN, folder: Path, traced: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are damaged on their way to the disk."""
    monkeypatch.setattr(bundle, "_traced", lambda _, part, *__: traced[part.name])
    write = Weights.write

    def write_damaged(weights: Weights, to: Path) -> None:
        write(weights, to)
        content = bytearray((to / "weights.bin").read_bytes())
        content[:256] = np.ones(64, dtype=np.float32).tobytes()
        (to / "weights.bin").write_bytes(content)

    export_bundle(net, tmp_path / "bundle", images(), ABOUT)
    shutil.rmtree(tmp_path / "bundle")
    monkeypatch.setattr(Weights, "write", write_damaged)
    refused(net, tmp_path, r"differs from the network on real images, by up to [0-9.e-]+ in a logit where")
    monkeypatch.setattr(Weights, "write", write)
    broken = small()
    with torch.no_grad():
        broken.nets["c"].get_submodule("fc").bias.fill_(float("nan"))
    refused(broken, tmp_path, "differs from the network")


def test_what_the_page_on_bundles_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    net = ddnn.nest(build("cifar/resnet8", 2, 4)[0], {}, full_name="resnet8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "bundle.md", "exec"), {"net": net, "images": images(size=32)})
    assert load("bundle").classes == ("cat", "dog")


@pytest.mark.slow
def test_a_bundle_is_hardly_larger_than_the_full_net_alone(tmp_path: Path) -> None:
    """On the smallest preset, where graphs and norms weigh most; as `torch.onnx.export` writes the full-net."""
    torch.manual_seed(0)
    net = shaken(ddnn.nest(*build("cifar-resnet8-14-20", 100, 16)))
    about = About([f"class {i}" for i in range(100)], (0.5,) * 3, (0.25,) * 3)
    export_bundle(net, tmp_path / "bundle", images(size=32), about)
    holds(tmp_path / "bundle", net, 32)
    with quiet():
        torch.onnx.export(
            net.nets[net.full_name],
            (images(2, 32),),
            tmp_path / "alone.onnx",
            dynamic_shapes=({0: torch.export.Dim("N")},),
            external_data=False,
            verbose=False,
        )
    total = sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir())
    assert total <= 1.02 * (tmp_path / "alone.onnx").stat().st_size


@pytest.mark.slow
def test_torchvision_networks_too(tmp_path: Path) -> None:
    """With bottleneck blocks, a max pooling and four stages."""
    torch.manual_seed(0)
    full_net = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=5)
    net = shaken(ddnn.nest(full_net, {"small": (1, 1, 1, 1)}))
    export_bundle(net, tmp_path / "bundle", images(size=32), About(**{**vars(ABOUT), "resize": None}))
    holds(tmp_path / "bundle", net, 32)


@pytest.mark.slow
def test_shared_norms_and_private_heads(tmp_path: Path) -> None:
    net = small("shared", "private")
    export_bundle(net, tmp_path / "bundle", images(), ABOUT)
    holds(tmp_path / "bundle", net, 16)
