"""Plain PyTorch: the full-net first, bfloat16, gradient accumulation, clipping, a moving average of the weights.

python examples/plain_pytorch.py
"""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import ddnn
from digits import BF16, digits, make_net, report


def main(epochs: int = 4, accumulate: int = 2) -> dict[str, float]:
    """Train, and return the accuracy of every sub-net."""
    torch.manual_seed(0)
    train, test = digits()
    batches = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    net = make_net()
    objective = ddnn.EKD(temperature=3.0, kl=1.0, attention=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(batches) // accumulate))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    for epoch in range(epochs):
        if epoch == epochs // 2:
            net.follow_full_net()  # the sub-nets join it
        learning = [net.full_name] if epoch < epochs // 2 else None  # None: all nets
        for i, (images, target) in enumerate(batches, start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                outputs = net(images, only=learning)  # what nets have in common runs once
            terms = objective(outputs, target)  # float32, whatever the network ran in
            (sum(terms.values()) / accumulate).backward()
            if i % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                average.update_parameters(net)
        print(f"epoch {epoch}  " + "  ".join(f"{name} {term.item():.3f}" for name, term in terms.items()))
    return report(average.module, test)


if __name__ == "__main__":
    main()
