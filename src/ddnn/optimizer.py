"""Optimiser and learning-rate schedule of a recipe."""

import math

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ddnn import recipe


def make_optimizer(net: nn.Module, optim: recipe.Optim) -> Optimizer:
    """SGD or AdamW over all parameters, each once; normalisation layers and biases are not decayed."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)
    return AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def take_in_late(optimizer: Optimizer) -> None:
    """Get ready for parameters that had no gradient so far, beside others that had: fused SGD needs all momenta."""
    if isinstance(optimizer, SGD) and optimizer.defaults["momentum"]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def make_scheduler(optimizer: Optimizer, schedule: recipe.Schedule, epochs: int, steps_per_epoch: int) -> LambdaLR:
    """The rate as a function of the step alone, so that a resumed run has it to the last bit."""
    total = epochs * steps_per_epoch
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    return LambdaLR(optimizer, lambda step: rate(schedule, step, total, warmup))


def rate(schedule: recipe.Schedule, step: int, total: int, warmup: int = 0) -> float:
    """Share of the peak learning rate at a step, counted from 0, of `total`."""
    if schedule.name == "onecycle":
        # Smith and Topin 2017, arXiv 1708.07120, as cosine: from a 25th up to the peak, then down to nothing.
        top = schedule.rise * total
        if step < top:
            return 1 / 25 + (1 - 1 / 25) * _cosine(1 - step / top)
        return _cosine((step - top) / (total - top))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "cosine":
        return _cosine((step - warmup) / (total - warmup))
    if schedule.name == "multistep":
        return float(schedule.gamma ** sum(step >= m * total for m in schedule.milestones))
    return 1.0


def _cosine(x: float) -> float:
    """From 1 at x = 0 to 0 at x = 1."""
    return (1 + math.cos(math.pi * min(x, 1.0))) / 2
