"""Hugging Face Accelerate: bf16, gradient accumulation, one process or several, its checkpoints.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import ddnn
from digits import BF16, digits, make_net, report


def main(epochs: int = 4, folder: str | Path | None = None) -> dict[str, float]:
    """Train, keep a checkpoint in `folder`, read it back, and return the accuracy of every sub-net."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if BF16 else "no", gradient_accumulation_steps=2)
    train, test = digits()
    net = make_net()
    objective = ddnn.EKD(temperature=3.0, kl=1.0, attention=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = DataLoader(train, batch_size=32 // accelerator.num_processes, shuffle=True, drop_last=True)
    # In several processes this is DistributedDataParallel as it is: one forward gives all nets, and every parameter
    # gets a gradient in every backward.
    model, optimizer, batches = accelerator.prepare(net, optimizer, batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, epochs * len(batches) // 2)

    for epoch in range(epochs):
        for images, target in batches:
            with accelerator.accumulate(model):
                terms = objective(model(images), target)
                accelerator.backward(sum(terms.values()))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()
        accelerator.print(f"epoch {epoch}  " + "  ".join(f"{name} {t.item():.3f}" for name, t in terms.items()))

    with tempfile.TemporaryDirectory() as scratch:
        accelerator.save_state(str(folder or scratch))  # safetensors, every shared tensor once
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        accelerator.load_state(str(folder or scratch))
    accelerator.wait_for_everyone()
    top1 = report(accelerator.unwrap_model(model), test) if accelerator.is_main_process else {}
    accelerator.end_training()
    return top1


if __name__ == "__main__":
    main()
