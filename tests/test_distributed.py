"""In several processes: the joint step is plain DistributedDataParallel, without a search for unused parameters."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ddnn
from ddnn.families.cifar_resnet import resnet
from ddnn.network import DDNN

RANKS = 2


def make() -> DDNN:
    torch.manual_seed(0)
    return ddnn.nest(resnet(20, num_classes=10, width=4), {"resnet8": (1, 1, 1), "resnet14": (2, 2, 2)})


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)


class Features(nn.Module):
    """The part of a detector that a DDNN has."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ddnn.Backbone(make(), stages=(0, 1))

    def forward(self, images: Tensor) -> Tensor:
        return sum(f.square().mean() for features in self.backbone.each(images).values() for f in features)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    model = DistributedDataParallel(make())  # find_unused_parameters is off
    with model.no_sync():  # two batches to a step
        sum(ddnn.EKD()(model(batch(rank, 0)[0]), batch(rank, 0)[1]).values()).backward()
    sum(ddnn.EKD()(model(batch(rank, 1)[0]), batch(rank, 1)[1]).values()).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    features = DistributedDataParallel(Features())
    for step in range(2):  # the second forward fails where a parameter of the first got no gradient
        features(batch(rank, step)[0]).backward()
    torch.save(gradients, f"{folder}/gradients-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
    found = [torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    nets = [copy.deepcopy(make()) for _ in range(RANKS)]
    for rank, net in enumerate(nets):
        for step in range(2):
            images, target = batch(rank, step)
            sum(ddnn.EKD()(net(images), target).values()).backward()
    for name, parameter in nets[0].named_parameters():
        mean = torch.stack([dict(net.named_parameters())[name].grad for net in nets]).mean(0)
        assert parameter.grad is not None
        for gradients in found:
            torch.testing.assert_close(gradients[name], mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0][name], found[1][name])
