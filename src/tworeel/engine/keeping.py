"""A checkpoint's contexts that keep what some operations return, and give it back in the recomputation.

As torch's own (`create_selective_checkpoint_contexts`), but theirs see each operation of a block, forward and
again, and that takes the host longer than a short block computes: here attentions alone are looked at, unless
others are to be kept, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
ATTENTION_OPS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
"""What `selective` keeps: little memory, and a third to a half of a forward over a long clip."""
_CALLED = frozenset(
    {
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        *ATTENTION_OPS,
        *(op.overloadpacket for op in ATTENTION_OPS),
    }
)
"""What a block calls for them."""

IsKept = Callable[[Any, Sequence[Any]], bool]
"""(operation, its arguments) -> whether what it returns is kept for the backward."""
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Of the forward and of the recomputation."""


def keeping_contexts(
    is_kept: IsKept,
    put: Callable[[Tensor], Any] | None = None,
    get: Callable[[Any], Tensor] | None = None,
    *,
    only_attentions: bool,
) -> Callable[[], Contexts]:
    """A checkpoint's `context_fn`.

    Args:
        is_kept: which operations' results are kept.
        put: takes a tensor to where it is kept; by default it stays as it is.
        get: brings back what `put` gave.
        only_attentions: no other operation can be among them.
    """
    put, get = put or _Held, get or _Held.get

    def make() -> Contexts:
        kept = deque[Any]()
        modes = _Keeping(is_kept, put, kept), _Replaying(is_kept, get, kept)
        return (_AroundAttentions(modes[0]), _AroundAttentions(modes[1])) if only_attentions else modes

    return make


class _Held:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError("what a selective block keeps was written into: it needs another residency")
        return self._tensor


class _Keeping(TorchDispatchMode):
    def __init__(self, is_kept: IsKept, put: Callable[[Tensor], Any], kept: deque[Any]) -> None:
        super().__init__()
        self._is_kept, self._put, self._kept = is_kept, put, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_kept(func, args):
            self._kept.append(tree_map_only(Tensor, lambda t: _Wrapped(self._put(_detached(t))), result))
        return result


class _Replaying(TorchDispatchMode):
    """Lets go of what it gives: it is needed once."""

    def __init__(self, is_kept: IsKept, get: Callable[[Any], Tensor], kept: deque[Any]) -> None:
        super().__init__()
        self._is_kept, self._get, self._kept = is_kept, get, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_kept(func, args):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError("what a selective block keeps is had once: retain_graph=True cannot have it")
        return tree_map_only(_Wrapped, lambda one: self._get(one.value).detach(), self._kept.popleft())


def _detached(tensor: Tensor) -> Tensor:
    """Without the graph, but counting with the tensor how often it is written into.

    Below autograd, where a mode is, only this key sees to that; torch's own checkpoint does the same.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Wrapped:
    """What `put` gave, whatever it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _AroundAttentions(TorchFunctionMode):
    """Lets a dispatch mode see attentions alone."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CALLED:
            return func(*args, **(kwargs or {}))
        with self._mode:
            return func(*args, **(kwargs or {}))
