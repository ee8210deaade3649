"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tworeel.config.schema import TrainConfig
from tworeel.errors import UserError

_FUSED = {"cpu", "cuda", "mps", "xpu"}
"""Kinds of devices that torch's fused AdamW has kernels for."""


def require_optimizer(config: TrainConfig) -> None:
    """Raise UserError if the optimizer needs a package that is not installed."""
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer = 'adamw8bit': needs bitsandbytes; pip install 'tworeel[eightbit]' brings it"
        )


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Make the optimizer of the run; the parameters may lie on several devices.

    Raises:
        UserError: see `require_optimizer`.
    """
    require_optimizer(config)
    trained = list(parameters)
    options = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, **options)
    return AdamW(trained, fused=all(p.device.type in _FUSED for p in trained), **options)  # type: ignore[arg-type]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear rise, then constant, linear or cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all groups of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Clip the gradients of all stages to one norm together; return the norm before.

    The norm may come back as NaN or infinite: the caller stops then, before the optimizer.
    """
    limit = math.inf if max_norm is None else max_norm
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
