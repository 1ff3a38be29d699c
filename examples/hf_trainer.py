"""Hugging Face Trainer: a DDNN in the shape that Trainer wants, with bf16, gradient accumulation and checkpoints.

python examples/hf_trainer.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

import ddnn
from digits import BF16, digits, make_net, report


class ForTrainer(nn.Module):
    """`forward(**batch)` returns the loss and, by name, the logits of every sub-net: all that Trainer asks for."""

    def __init__(self, net: ddnn.DDNN, objective: ddnn.EKD) -> None:
        super().__init__()
        self.net = net
        self.objective = objective

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] and their classes [N]."""
        outputs = self.net(pixel_values)
        loss = sum(self.objective(outputs, labels).values())
        return {"loss": loss, **{name: output.logits for name, output in outputs.items()}}


class Named(Dataset[dict[str, Tensor]]):
    """A data set of pairs with the names that the forward has."""

    def __init__(self, pairs: Dataset[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images, target = self.pairs[index]
        return {"pixel_values": images, "labels": target}


def main(epochs: int = 4, folder: str | Path | None = None) -> dict[str, float]:
    """Train, keep checkpoints in `folder`, and return the accuracy of every sub-net."""
    torch.manual_seed(0)
    train, test = digits()
    net = make_net()
    names = list(net.depths)

    def top1(prediction: EvalPrediction) -> dict[str, float]:
        logits = dict(zip(names, prediction.predictions, strict=True))
        return {f"top1_{name}": float(np.mean(z.argmax(1) == prediction.label_ids)) for name, z in logits.items()}

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(folder or scratch),
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=360,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            bf16=BF16,
            use_cpu=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            dataloader_drop_last=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            ForTrainer(net, ddnn.EKD(temperature=3.0, kl=1.0, attention=1.0)),
            arguments,
            train_dataset=Named(train),
            eval_dataset=Named(test),
            compute_metrics=top1,
        )
        trainer.train()
    return report(net, test)


if __name__ == "__main__":
    main()
