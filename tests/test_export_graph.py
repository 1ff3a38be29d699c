"""From a network to ONNX, and a graph cut into parts."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ddnn.export.graph import cut, fold_norms, trace
from nets import images, run


class Net(nn.Module):
    """Reads the number of images where it can: at the images, long before it is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        feature = self.norm(self.conv(x)).relu()
        return feature.mean((2, 3)) * torch.arange(n, dtype=torch.float32)[:, None], feature


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.uniform_(net.norm.running_mean)
    return net


@pytest.fixture(scope="module")
def traced(net: Net) -> ir.Model:
    return trace(net, images(2), ["logits", "at_1"])


def test_parts_make_what_the_whole_makes(net: Net, traced: ir.Model, tmp_path: Path) -> None:
    ir.save(cut(traced, ["images"], ["at_1"]), tmp_path / "first.onnx")
    second = cut(traced, ["at_1"], ["logits"])
    assert "Shape" in [node.op_type for node in second.graph]
    ir.save(second, tmp_path / "second.onnx")
    for n in (1, 3):
        x = images(n)
        with torch.no_grad():
            logits, feature = net(x)
        made = run(tmp_path / "first.onnx", images=x.numpy())["at_1"]
        np.testing.assert_allclose(made, feature.numpy(), rtol=0, atol=1e-5)
        made = run(tmp_path / "second.onnx", at_1=feature.numpy())["logits"]
        np.testing.assert_allclose(made, logits.numpy(), rtol=0, atol=1e-5)


def test_a_graph_is_left_as_it_was(traced: ir.Model) -> None:
    before = ir.serde.serialize_model(traced).SerializeToString()
    part = cut(traced, ["images"], ["logits"])
    fold_norms(part)
    assert "BatchNormalization" not in [node.op_type for node in part.graph]
    assert ir.serde.serialize_model(traced).SerializeToString() == before


def test_norms_stay_and_only_a_pooling_becomes_one(traced: ir.Model) -> None:
    operators = [node.op_type for node in traced.graph]
    assert operators.count("BatchNormalization") == 1
    assert "GlobalAveragePool" not in operators  # which keeps the dimensions that this mean drops
    assert operators.count("ReduceMean") == 1
