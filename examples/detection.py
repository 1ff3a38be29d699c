"""torchvision's FCOS on the nets of a DDNN: one pyramid and one head, and the depth chosen per call.

python examples/detection.py
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork

import ddnn
from ddnn.families import build
from shapes import CLASSES, Target, average_precision, make_shapes

SIZE, CHANNELS = 64, 32


class Pyramid(nn.Module):
    """What torchvision's detectors call a backbone: images -> maps by name, all of `out_channels`."""

    out_channels = CHANNELS

    def __init__(self, features: ddnn.Backbone, pyramid: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.features = features
        self.pyramid = pyramid

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Images [N, 3, H, W] -> a map for every stage."""
        return self.pyramid(OrderedDict(zip(self.features.stages, self.features(images), strict=True)))


class Detector(nn.Module):
    """A detector for every depth; all share the pyramid and the head, and their backbones share what the DDNN does."""

    def __init__(self, net: ddnn.DDNN) -> None:
        super().__init__()
        backbone = ddnn.Backbone(net, stages=(1, 2))
        pyramid = FeaturePyramidNetwork(list(backbone.channels), CHANNELS)
        head = FCOSHead(CHANNELS, num_anchors=1, num_classes=len(CLASSES) + 1, num_convs=2)
        anchors = AnchorGenerator(tuple((s,) for s in backbone.strides), ((1.0,),) * len(backbone.strides))
        self.depths = nn.ModuleDict(
            {
                name: FCOS(
                    Pyramid(backbone.at(name), pyramid),
                    num_classes=len(CLASSES) + 1,
                    head=head,
                    anchor_generator=anchors,
                    min_size=SIZE,
                    max_size=SIZE,
                    detections_per_img=10,
                )
                for name in backbone.names
            }
        )

    def forward(self, images: Tensor, depth: str, targets: list[Target] | None = None) -> dict | list[Target]:
        """In training the losses by name, else the boxes found in every image, by the net called `depth`."""
        return self.depths[depth](list(images), targets)


def main(steps: int = 100, batch: int = 8) -> dict[str, float]:
    """Train, and return the average precision at an overlap of one half, of every depth."""
    torch.manual_seed(0)
    images, targets = make_shapes(512, SIZE, seed=0)
    test_images, test_targets = make_shapes(100, SIZE, seed=1)
    full_net, depths = build("cifar-resnet8-14-20", num_classes=10, width=8)
    detector = Detector(ddnn.nest(full_net, depths))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,)).tolist()
        losses = {}
        for depth in detector.depths:
            for name, loss in detector(images[chosen], depth, [targets[i] for i in chosen]).items():
                losses[f"{depth}/{name}"] = loss
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}  loss {sum(losses.values()).item():.3f}")

    detector.eval()
    precision = {}
    with torch.inference_mode():
        for depth in detector.depths:
            found = [box for part in test_images.split(20) for box in detector(part, depth)]
            precision[depth] = average_precision(found, test_targets)
            print(f"{depth:10} average precision {precision[depth]:.3f}")
    return precision


if __name__ == "__main__":
    main()
