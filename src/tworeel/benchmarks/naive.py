"""The baseline: one micro-batch at a time with per-block device hooks.

This is how a model is run that accelerate's `dispatch_model` or a trainer's device map has spread: each
module moves whatever it is given to its own device, the blocks are checkpointed, everything is eager, and
one backward goes through the whole graph. Only PyTorch is used for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tworeel.engine import Placement
from tworeel.engine.attention_layout import keep_gradient_layouts
from tworeel.engine.lean import upstream_forwards

Forward = Callable[..., Any]


@contextmanager
def device_hooks(model: nn.Module, placement: Placement) -> Iterator[None]:
    """Run `model` with a hook for each of its blocks, and for what comes before and after them.

    Blocks run by diffusers' own forward. The weights have to be on their devices. Afterwards the model is as
    it was.
    """
    # What is planned for attentions here must do for the pipeline's, too.
    keep_gradient_layouts()
    hooked = [(model.get_submodule(unit.name), unit) for unit in placement.units]
    for module, unit in hooked:
        moving = _moving(module.forward, placement.devices[unit.stage])
        module.forward = recomputed(moving) if unit.is_block else moving
    try:
        with upstream_forwards(model):
            yield
    finally:
        for module, _ in hooked:
            del module.forward


def _moving(forward: Forward, device: torch.device) -> Forward:
    """All tensor arguments are moved each time, also those that the block before has moved already."""

    def moving(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        return forward(*args, **kwargs)

    return moving


def recomputed(forward: Forward, *, preserve_rng_state: bool = True) -> Forward:
    """The forward under a checkpoint: it is computed again in the backward."""

    def again(*args: Any, **kwargs: Any) -> Any:
        how: Any = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        return checkpoint(forward, *args, **how, **kwargs)

    return again
