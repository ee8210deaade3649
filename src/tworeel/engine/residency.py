"""What a block's forward leaves behind for its backward, and where."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.keeping import ATTENTION_OPS, keeping_contexts
from tworeel.engine.parking import Berth, storage_of

_LEAST_KEYS = 4
"""An attention is kept if it has at least one key for so many queries; over a short text it is cheap."""
AUTO = "auto"
"""In place of a residency: what there is memory for."""


class Residency(StrEnum):
    """What a block leaves behind for its backward."""

    KEEP = "keep"
    """All activations, on the device: fastest, most memory."""
    SELECTIVE = "selective"
    """The block's input and what its self-attention returned; the rest is computed again."""
    RECOMPUTE = "recompute"
    """The block's input; the rest is computed again (gradient checkpointing)."""
    OFFLOAD = "offload"
    """As `RECOMPUTE`, and it waits in pinned host memory."""
    OFFLOAD_SELECTIVE = "offload-selective"
    """As `SELECTIVE`, and it waits in pinned host memory."""

    @property
    def recomputes(self) -> bool:
        """Whether some of the forward is computed again."""
        return self is not Residency.KEEP

    @property
    def is_selective(self) -> bool:
        """Whether what the attentions returned is kept."""
        return self in (Residency.SELECTIVE, Residency.OFFLOAD_SELECTIVE)

    @property
    def is_parked(self) -> bool:
        """Whether what is kept waits in host memory."""
        return self in (Residency.OFFLOAD, Residency.OFFLOAD_SELECTIVE)


def one_a_block(residency: Residency | str | Sequence[Residency | str], num_blocks: int) -> list[Residency]:
    """What each block leaves behind, from what a caller gave: one for all, or one a block.

    Raises:
        ValueError: no such residency, or not as many as blocks.
    """
    if isinstance(residency, str):
        # Until it is fitted, `auto` recomputes.
        return [Residency.RECOMPUTE if residency == AUTO else Residency(residency)] * num_blocks
    if len(residency) != num_blocks:
        raise ValueError(f"{len(residency)} residencies for {num_blocks} blocks: give one, or one a block")
    return [Residency(one) for one in residency]


@cache
def plain_call(kind: Any) -> Callable[..., Any]:
    """Run a block of a class: (block, *args, **kwargs) -> what the class's forward returns."""
    forward = kind.forward

    def plain(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    return plain


@cache
def selective_call(kind: Any, kept_ops: frozenset[Any] = frozenset()) -> Callable[..., Any]:
    """The same, under a checkpoint that keeps what the attentions, and some other operations, returned."""
    forward, contexts = kind.forward, selective_contexts(kept_ops)

    def selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _recomputing(forward, block, args, kwargs, context_fn=contexts)

    return selective


@cache
def selective_contexts(kept_ops: frozenset[Any]) -> Callable[[], Any]:
    """A checkpoint's `context_fn` that keeps what `is_kept` says."""

    def policy(_context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = is_kept(op, args, kept_ops)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def is_kept(op: Any, args: Sequence[Any], kept_ops: Collection[Any] = ()) -> bool:
    """Whether `selective` keeps the result of an operation: of an attention over many keys, or a chosen one.

    Args:
        op: as a dispatch mode sees it.
        args: of an attention, its query and key, of shape (B, heads, L, head width), come first.
        kept_ops: those that are chosen.
    """
    if op in kept_ops:
        return True
    return op in ATTENTION_OPS and args[1].shape[-2] * _LEAST_KEYS >= args[0].shape[-2]


def _recomputing(forward: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any, **how: Any) -> Any:
    """Run a block under a checkpoint that holds only the inputs that change from block to block.

    What all blocks share (text, RoPE tables, modulation) the recomputation captures.
    """
    leaves, spec = tree_flatten((args, kwargs))
    changing = _changing(leaves)

    def rerun(*tensors: Tensor) -> Any:
        merged = list(leaves)
        for i, tensor in zip(changing, tensors, strict=True):
            merged[i] = tensor
        inner_args, inner_kwargs = tree_unflatten(merged, spec)
        return forward(block, *inner_args, **inner_kwargs)

    inputs = [leaves[i] for i in changing]
    for i in changing:
        leaves[i] = None
    return checkpoint(rerun, *inputs, use_reentrant=False, **{"preserve_rng_state": False, **how})


def _changing(leaves: Sequence[Any]) -> list[int]:
    """Which of a block's arguments are not shared by all blocks: those that need a gradient, and the first.

    That is the hidden state, which needs none where the first block is given it.
    """
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (i == 0 or leaf.requires_grad)]


def run_block(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    residency: Residency,
    berth: Berth | None = None,
    compiler: BlockCompiler | None = None,
    kept_ops: frozenset[Any] = frozenset(),
    redraws: bool = False,
) -> Any:
    """Run a block's forward so that it leaves behind what `residency` says.

    Args:
        block: runs by its class's forward.
        args, kwargs: of the forward.
        residency: what is kept for the backward.
        berth: where it waits, if that is host memory.
        compiler: runs the block compiled.
        kept_ops: operations whose results the selective residencies keep beside those of attentions.
        redraws: a recomputation draws the random numbers of its forward again. A pipeline cannot do that, as
            its threads share one generator, and refuses dropout instead (see `Split.refuse_dropout`).
    """
    if not torch.is_grad_enabled():
        residency = Residency.KEEP
    kind: Any = type(block)
    plain, selective = plain_call(kind), selective_call(kind, kept_ops)
    call = plain if compiler is None or plain in compiler.failed else partial(compiler, plain)
    parking: AbstractContextManager[None] = nullcontext()
    if berth is not None and residency.is_parked:
        parking = berth.hooks(_shared_storages(block, args, kwargs))
    with parking:
        if not residency.recomputes:
            return call(block, *args, **kwargs)
        if not residency.is_selective:
            # Outside of what is compiled: compiled with it, the backward takes a third more memory.
            return _recomputing(call, block, args, kwargs, preserve_rng_state=redraws)
        if compiler is not None and selective not in compiler.failed:
            return compiler(selective, block, *args, **kwargs)
        put, get = (berth.park, berth.get) if berth is not None and residency.is_parked else (None, None)
        kept = partial(is_kept, kept_ops=kept_ops)
        contexts = keeping_contexts(kept, put, get, only_attentions=not kept_ops)
        return _recomputing(plain, block, args, kwargs, context_fn=contexts, preserve_rng_state=redraws)


def _shared_storages(block: nn.Module, args: Any, kwargs: Any) -> set[int]:
    """Storages that are held anyway: of the block's weights, and of inputs that all blocks share."""
    leaves = tree_leaves((args, kwargs))
    changing = _changing(leaves)
    constants = [leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in changing]
    return set(map(storage_of, (*constants, *block.parameters(), *block.buffers())))
