"""timm's train script with a DDNN in it: its task, optimiser, schedule, Mixup, clipping and moving average.

python examples/timm_train.py

timm's `train.py` trains a `TrainingTask`. Put this one in the place of its `ClassificationTask`, and give it a DDNN.
"""

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ddnn
from digits import BF16, digits, report

SMALL = {"num_classes": 10, "channels": (16, 32, 64, 128)}  # of timm's ResNets: a quarter of the width


class EKDTask(ClassificationTask):
    """`EKDTask(net, criterion=ddnn.EKD())`: what timm's loop calls with images and targets."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss, its terms, and the logits of the full-net, which timm calls the output."""
        outputs = self.trainable_module(input)
        terms = self.criterion(outputs, target)  # classes or, after Mixup, probabilities
        *_, full_net = outputs.values()
        return {"loss": sum(terms.values()), "output": full_net.logits, **terms}


def make_net() -> ddnn.DDNN:
    """timm's ResNet-18 in timm's ResNet-34."""
    full_net = timm.create_model("resnet34", **SMALL)
    return ddnn.nest(full_net, {"resnet18": (2, 2, 2, 2)}, full_name="resnet34")


def enlarged(pairs: torch.utils.data.Dataset) -> TensorDataset:
    """The digits at 32 px; timm's ResNets begin with a stride of four."""
    images, target = next(iter(DataLoader(pairs, batch_size=len(pairs))))
    return TensorDataset(F.interpolate(images, size=32, mode="bilinear"), target)


def main(epochs: int = 3, accumulate: int = 2) -> dict[str, float]:
    """Train, hand the small network to timm, and return the accuracy of every sub-net."""
    torch.manual_seed(0)
    train, test = map(enlarged, digits())
    batches = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    task = EKDTask(make_net(), criterion=ddnn.EKD(temperature=3.0, kl=1.0, attention=1.0))
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=3e-3, weight_decay=0.02)
    updates = len(batches) // accumulate
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=updates
    )
    mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.0, num_classes=10)
    task.setup_ema(decay=0.9)

    for epoch in range(epochs):
        task.train()
        losses = AverageMeter()
        for i, (images, target) in enumerate(batches, start=1):
            images, target = mixup(images, target)
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                result = task(images, target)
            (result["loss"] / accumulate).backward()
            losses.update(result["loss"].item(), len(images))
            if i % accumulate == 0:
                dispatch_clip_grad(task.get_clip_parameters(), value=5.0)
                optimizer.step()
                optimizer.zero_grad()
                update = epoch * updates + i // accumulate
                task.update_ema(step=update)
                schedule.step_update(update)
        print(f"epoch {epoch}  loss {losses.avg:.3f}")

    net = task.get_trainable_module(ema=True).module
    small = timm.create_model("resnet18", **SMALL)
    small.load_state_dict(net.subnet("resnet18").state_dict(), strict=True)
    return report(net, test)


if __name__ == "__main__":
    main()
