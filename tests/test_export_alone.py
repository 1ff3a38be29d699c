"""Each sub-net alone: the file, read by its own runtime and nothing of ours, gives what the network gives."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ddnn.errors import ExportError
from ddnn.export import About, alone, export_alone
from ddnn.export.quiet import quiet
from ddnn.network import DDNN
from nets import images, run, small

ABOUT = About(classes=("v", "w", "x", "y", "z"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize=18)


@pytest.fixture(scope="module")
def net() -> DDNN:
    return small()


def by_onnx(path: Path, x: torch.Tensor) -> np.ndarray:
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    assert "BatchNormalization" not in [node.op_type for node in graph.node]
    return run(path, images=x.numpy())["logits"]


def by_torch(path: Path, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.export.load(path).module()(x).numpy()


def by_openvino(path: Path, x: torch.Tensor) -> np.ndarray:
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(x.numpy())[0]


def by_executorch(path: Path, x: torch.Tensor) -> np.ndarray:
    with quiet():
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        method = program.load_method("forward")
    return np.concatenate([method.execute([image])[0].numpy().copy() for image in x.split(1)])


@pytest.mark.parametrize(
    ("kind", "file", "runs"),
    [
        ("onnx", "a.onnx", by_onnx),
        ("torch-export", "a.pt2", by_torch),
        ("openvino", "a.xml", by_openvino),
        pytest.param("executorch", "a.pte", by_executorch, marks=pytest.mark.slow),
    ],
)
def test_the_file_is_the_network(kind: str, file: str, runs: object, net: DDNN, tmp_path: Path) -> None:
    pytest.importorskip(alone.FORMATS[kind].package)
    manifest = export_alone(net, tmp_path / "out", images(), ABOUT, kind, ["a"])
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    x = images(3)
    with torch.no_grad():
        expected = net.nets["a"](x).numpy()
    got = runs(tmp_path / "out" / file, x)  # type: ignore[operator]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert manifest["format"] == f"ddnn-{kind}"
    assert manifest["input"]["resize"] == 18
    (entry,) = manifest["nets"]
    assert (entry["name"], entry["graph"]) == ("a", file)
    assert entry["parity"]["max_abs"] <= entry["parity"]["tolerance"]
    assert file in manifest["files"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", *manifest["files"]}


def write_weights(net: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch.save(net.state_dict(), path)


def run_twin(path: Path, x: torch.Tensor) -> np.ndarray:
    """What a plain network with the weights of the file gives."""
    twin = small().nets[path.stem]
    twin.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        return twin(x).numpy()


def test_all_sub_nets_or_some(net: DDNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a format that costs no time."""
    monkeypatch.setitem(alone.FORMATS, "quick", alone.Format(".pt", "torch", write_weights, run_twin))
    export_alone(net, tmp_path / "all", images(), ABOUT, "quick")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"a.pt", "b.pt", "c.pt", "manifest.json"}
    manifest = export_alone(net, tmp_path / "some", images(), ABOUT, "quick", ["c", "a"])
    assert [entry["name"] for entry in manifest["nets"]] == ["a", "c"]


def test_a_file_that_differs_is_not_written(net: DDNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_damaged(net: nn.Module, images: torch.Tensor, path: Path) -> None:
        with torch.no_grad():
            next(net.parameters()).mul_(1.01)
        write_weights(net, images, path)

    form = alone.Format(".pt", "torch", write_damaged, run_twin)
    monkeypatch.setitem(alone.FORMATS, "quick", form)
    with pytest.raises(ExportError, match="quick of a differs from the network on real images"):
        export_alone(net, tmp_path / "out", images(), ABOUT, "quick")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(alone.FORMATS, "quick", replace(form, write=write_weights))
    export_alone(net, tmp_path / "out", images(), ABOUT, "quick")


def test_mistakes_end_in_a_sentence(net: DDNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no format 'tflite'; there are: bundle, onnx, torch-export"):
        export_alone(net, tmp_path / "out", images(), ABOUT, "tflite")
    with pytest.raises(ExportError, match="no net 'd' in this run; it has a, b, c"):
        export_alone(net, tmp_path / "out", images(), ABOUT, "onnx", ["d"])
    with pytest.raises(ExportError, match="statistics of a, b were never calibrated"):
        export_alone(small("recalibrated"), tmp_path / "out", images(), ABOUT, "onnx")
    for kind in ("openvino", "executorch"):
        monkeypatch.setitem(sys.modules, kind, None)
        sentence = (
            rf"format {kind}: this needs the extra {kind} \({kind} is not installed\): pip install 'ddnn\[{kind}\]'"
        )
        with pytest.raises(ExportError, match=sentence):
            export_alone(net, tmp_path / "out", images(), ABOUT, kind)
    assert list(tmp_path.iterdir()) == []
