"""What a block leaves behind between its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


class Residency(StrEnum):
    """Where a block's activations are until its backward needs them."""

    KEEP = "keep"
    """On the device, all of them: fastest, most memory."""
    RECOMPUTE = "recompute"
    """Only the block's input stays on the device; the rest is computed again (gradient checkpointing)."""
    OFFLOAD = "offload"
    """As `RECOMPUTE`, and the input waits in pinned host memory."""


def run_block(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    residency: Residency,
    device: torch.device,
) -> Any:
    """Run a block's forward so that it leaves behind what `residency` says.

    Inputs without a gradient (text, RoPE tables, modulation) are shared by all blocks: the recomputation
    captures them, and only what changes from block to block is kept or offloaded per block.
    """
    if residency is Residency.KEEP or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    changing = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def rerun(*tensors: Tensor) -> Any:
        merged = list(leaves)
        for i, tensor in zip(changing, tensors, strict=True):
            merged[i] = tensor
        inner_args, inner_kwargs = tree_unflatten(merged, spec)
        return forward(*inner_args, **inner_kwargs)

    inputs = [leaves[i] for i in changing]
    for i in changing:
        leaves[i] = None
    with _host_memory(device) if residency is Residency.OFFLOAD else nullcontext():
        # The pipeline refuses dropout, so there is no random state to carry (see `refuse_dropout`).
        return checkpoint(rerun, *inputs, use_reentrant=False, preserve_rng_state=False)


def _host_memory(device: torch.device) -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=device.type != "cpu", device_type=device.type)


def refuse_dropout(name: str, block: nn.Module) -> None:
    """Raise if a block that is recomputed draws random numbers.

    Several threads share one generator: a recomputation would not see the mask of its forward.

    Raises:
        ValueError: names the dropout module.
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{name}.{path}: dropout of {module.p} cannot be recomputed; use residency 'keep'"
            )
