"""Networks whose norms are as after some training, and a bundle's cascade walked by its manifest alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import ddnn
from ddnn.families import build
from ddnn.network import DDNN


def shaken(net: DDNN, seed: int = 0) -> DDNN:
    """In eval mode, with norms and statistics that differ everywhere, so that a mix-up can't go unseen."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return net.eval()


def small(norm: str = "private", head: str = "shared") -> DDNN:
    """Three nets for images of 16 px, five classes; the deepest goes on from the second, that from the shallowest."""
    torch.manual_seed(0)
    full_net = build("cifar/resnet14", 5, 4)[0]
    return shaken(ddnn.nest(full_net, {"a": (1, 1, 1), "b": (2, 1, 1)}, full_name="c", norm=norm, head=head))


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def coloured(n: int, seed: int = 1, size: int = 16) -> torch.Tensor:
    """Images that differ as a whole, as real ones do, so that a network makes different things of them."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(n, 3, 1, 1, generator=generator) + torch.randn(n, 3, size, size, generator=generator) / 2


def run(graph: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def cascade(folder: Path, manifest: Mapping[str, Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """The logits of every net, each from what those before it have made."""
    features, logits = {"images": x}, {}
    for net in manifest["nets"]:
        part = net["cascade"]
        made = run(folder / part["graph"], **{tensor: features[of] for tensor, of in part["inputs"].items()})
        logits[net["name"]] = made.pop("logits")
        assert made.keys() == part["outputs"].keys()
        features |= {of: made[tensor] for tensor, of in part["outputs"].items()}
    return logits
