"""Coloured shapes on textured backgrounds, with known boxes, and the average precision of finding them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

CLASSES = ("disc", "square", "triangle")
Target = dict[str, Tensor]


def make_shapes(count: int, size: int = 64, seed: int = 0) -> tuple[Tensor, list[Target]]:
    """`count` images, float32 [count, 3, size, size] in [0, 1], each with one to three shapes that do not overlap.

    A target holds `boxes` [n, 4] (x1, y1, x2, y2) and `labels` [n], from 1 as torchvision counts.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, targets = [], []
    for _ in range(count):
        clouds = F.interpolate(uniform(0, 1, 1, 3, 6, 6), size=size, mode="bicubic")[0]
        stripes = torch.sin(uniform(0.2, 0.9) * x + uniform(-0.9, 0.9) * y)
        image = 0.6 * clouds + 0.25 * uniform(0, 1, 3, size, size) + 0.1 * stripes
        taken = torch.zeros(size, size, dtype=torch.bool)
        boxes, labels = [], []
        for _ in range(integer(1, 4)):
            label, side = integer(1, len(CLASSES) + 1), integer(size // 5, size // 3)
            left, top = integer(0, size - side + 1), integer(0, size - side + 1)
            if taken[top : top + side, left : left + side].any():
                continue
            u, v = (x + 0.5 - left) / side, (y + 0.5 - top) / side  # 0 to 1 inside of the box
            inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
            if label == 1:
                inside &= (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
            elif label == 3:
                inside &= 2 * (u - 0.5).abs() < v
            colour = uniform(0, 1, 3)
            colour[integer(0, 3)] = 1.0
            image[:, inside] = colour[:, None] + uniform(-0.1, 0.1, 3, int(inside.sum()))
            taken |= inside
            boxes.append([left, top, left + side, top + side])
            labels.append(label)
        images.append(image.clamp(0, 1))
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})
    return torch.stack(images), targets


def average_precision(found: list[Target], targets: list[Target], overlap: float = 0.5) -> float:
    """Mean over classes of the area under the precision-recall curve, a box being right from this overlap on (IoU).

    `found` holds `boxes`, `labels` and `scores` by image. Precision is made non-increasing from the right, as in the
    evaluation of Pascal VOC 2010 and later.
    """
    means = []
    for label in range(1, len(CLASSES) + 1):
        scores, right, total = [], [], 0
        for ours, theirs in zip(found, targets, strict=True):
            truth = theirs["boxes"][theirs["labels"] == label]
            total += len(truth)
            mine = ours["labels"] == label
            order = ours["scores"][mine].argsort(descending=True)
            boxes, free = ours["boxes"][mine][order], torch.ones(len(truth), dtype=torch.bool)
            for box, score in zip(boxes, ours["scores"][mine][order], strict=True):
                scores.append(float(score))
                best, which = (box_iou(box[None], truth)[0] * free).max(0) if len(truth) else (torch.zeros(()), 0)
                right.append(bool(best >= overlap))
                if right[-1]:
                    free[which] = False
        hits = (
            torch.tensor(right, dtype=torch.float64)[torch.tensor(scores).argsort(descending=True)] if scores else None
        )
        if hits is None or not total:
            means.append(0.0)
            continue
        recall = hits.cumsum(0) / total
        precision = (hits.cumsum(0) / torch.arange(1, len(hits) + 1)).flip(0).cummax(0).values.flip(0)
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        means.append(float((precision * steps).sum()))
    return sum(means) / len(means)
