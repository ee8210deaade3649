"""Follows what runs, operation by operation: bytes that are held, and work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tworeel.planning.work import Work, is_heavy, packet_of, work_of

aten = torch.ops.aten

_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
_SECTOR = 32
"""Bytes that a GPU reads at least
(https://docs.nvidia.com/cuda/cuda-c-best-practices-guide, "Coalesced Access to Global Memory")."""


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, and what the operations cost.

    Attributes:
        live: bytes that are held now.
        peak: the most that were.
        work: of all operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.work = Work()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {_storage(tensor) for tensor in given}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if _storage(tensor) not in before]
        for tensor in new:
            self._follow(tensor)
        if is_heavy(func):
            self.work += work_of(func, args, result)
        elif new or func._schema.is_mutable:
            changed = func._schema.is_mutable and packet_of(func) not in _OVERWRITES
            written = made if changed else new  # what is changed in its place is read, too
            self.work += Work(traffic=float(sum(map(_touched, (*given, *written)))), kernels=1)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _storage(tensor), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Let RMS norms hold what accelerators' fused kernels hold.

    On the CPU, whose operations fake tensors go through, the norm is composed of parts that each hold an fp32
    tensor. The kernel needs one dtype (torch's aten/src/ATen/native/layer_norm.cpp).
    """
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    for norm in norms:
        norm.forward = partial(_rms_norm, norm, norm.forward)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _rms_norm(norm: nn.RMSNorm, composed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return composed(x)
    fused: Tensor = _FusedRmsNorm.apply(x, norm.weight, len(norm.normalized_shape))
    return fused


class _FusedRmsNorm(torch.autograd.Function):
    """No numbers, only what is held: the input, the weight and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        rstd = x.new_empty(x.shape[:-dims], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(grad), None, None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _touched(tensor: Tensor) -> int:
    """Bytes of memory that are read for a tensor: with gaps between its numbers, those of the gaps, too."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    gaps = min(strides, default=1)
    return tensor.nbytes * max(1, min(gaps, _SECTOR // tensor.itemsize))
