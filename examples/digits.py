"""What every loop here trains: a network, on the handwritten digits of scikit-learn, which need no download."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import ddnn
from ddnn.device import has_bf16
from ddnn.evaluate import accuracy
from ddnn.families import build

Pair = tuple[torch.Tensor, torch.Tensor]

BF16 = has_bf16(torch.device("cpu"))
"""Whether this processor has instructions for bfloat16; where it has not, the loops here stay in float32."""


def digits() -> tuple[Dataset[Pair], Dataset[Pair]]:
    """1437 training and 360 test images, float32 [3, 8, 8], normalised, with their classes."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    images = ((images - 0.305) / 0.376).contiguous()
    every_fifth = torch.arange(len(images)) % 5 == 0
    both = TensorDataset(images, torch.tensor(data.target))
    return Subset(both, (~every_fifth).nonzero()[:, 0].tolist()), Subset(both, every_fifth.nonzero()[:, 0].tolist())


def make_net() -> ddnn.DDNN:
    """ResNet-8 and 14 in a ResNet-20 for small images. Yours: `ddnn.nest(full_net, {"small": (1, 1, 1)})`."""
    full_net, depths = build("cifar-resnet8-14-20", num_classes=10)
    return ddnn.nest(full_net, depths)


def report(net: ddnn.DDNN, test: Dataset[Pair]) -> dict[str, float]:
    """Top-1 accuracy of every sub-net, printed and returned."""
    top1 = {name: score["top1"] for name, score in accuracy(net, DataLoader(test, batch_size=360)).items()}
    for name, score in top1.items():
        print(f"{name:10} {100 * score:6.2f} %")
    return top1
