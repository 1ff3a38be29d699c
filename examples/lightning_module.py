"""Lightning: a LightningModule, with bf16, gradient accumulation, clipping, its moving average and its checkpoints.

python examples/lightning_module.py
"""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

import ddnn
from digits import BF16, digits, make_net, report


class Nested(lightning.LightningModule):
    """A DDNN and its objective."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_net()
        self.objective = ddnn.EKD(temperature=3.0, kl=1.0, attention=1.0)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """One forward of the tree, the sum of the terms."""
        images, target = batch
        terms = self.objective(self.net(images), target)
        self.log_dict({f"train/{name}": term for name, term in terms.items()}, on_step=False, on_epoch=True)
        return sum(terms.values())

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Accuracy of every sub-net."""
        images, target = batch
        for name, output in self.net(images).items():
            right = (output.logits.argmax(1) == target).float().mean()
            self.log(f"top1/{name}", right, on_step=False, on_epoch=True, batch_size=len(images))

    def configure_optimizers(self) -> dict[str, object]:
        """SGD with a cosine, stepped with every optimiser step."""
        optimizer = torch.optim.SGD(
            self.net.parameters(), lr=self.hparams.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(epochs: int = 4, folder: str | Path | None = None) -> dict[str, float]:
    """Train, keep a checkpoint in `folder`, read it back, and return the accuracy of every sub-net."""
    lightning.seed_everything(0)
    train, test = digits()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(folder or scratch) / "nested.ckpt"
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision="bf16-mixed" if BF16 else "32-true",
            accumulate_grad_batches=2,
            gradient_clip_val=5.0,
            callbacks=[EMAWeightAveraging(decay=0.9)],
            default_root_dir=scratch,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(
            Nested(), DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(test, batch_size=360)
        )
        trainer.save_checkpoint(checkpoint)
        again = Nested.load_from_checkpoint(checkpoint, weights_only=True)
    return report(again.net.cpu(), test)


if __name__ == "__main__":
    main()
