"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
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

    The norm may come back as NaN or infinite: the gradients are then as they were, and the caller stops
    before the optimizer.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = _total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if max_norm is not None and math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, torch.tensor(norm))
    return norm


def _total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, the same to the last bit over any devices.

    torch's own adds up device by device, in an order that changes with the split; `fsum` is exact.
    """
    squares: list[float] = []
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients if g.device == device])
        squares += [norm**2 for norm in norms.tolist()]
    return math.sqrt(math.fsum(squares))
