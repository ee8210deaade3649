"""Follows what runs, operation by operation: bytes that are held, and work."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tworeel.planning.graphs import Work, is_heavy, work_of


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
        elif new:
            self.work += Work(traffic=float(sum(tensor.nbytes for tensor in (*given, *new))))
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


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
