"""Code between the blocks that uses tensors from before an earlier block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from tworeel.engine.passage import Passage

_OF_ITSELF = {"__set__", "__len__", "__hash__", "size", "dim", "ndimension", "numel", "nelement", "stride"}
_OF_ITSELF |= {"element_size", "is_floating_point", "is_complex", "is_contiguous"}
_OF_ITSELF |= {"requires_grad_", "retain_grad", "register_hook", "tolist"}
"""What is asked of a tensor, or is to hold for it, is meant for that very one and needs no copy."""


class Strays(TorchFunctionMode):
    """Brings what a forward's own code uses to the stage where that code runs, and cuts it where it has to.

    Left to itself, the code's own `.to()` would let both devices wait for all that is queued on the other.
    """

    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self._passage = passage

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        passage, kwargs = self._passage, kwargs or {}
        name = getattr(func, "__name__", "")
        if passage.inside or passage.done or name in _OF_ITSELF or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if name == "__get__":
            outputs = func(*args, **kwargs)
            passage.inherit(outputs, args[0])
            return outputs
        fixed = 1 if _writes(name) else 0
        if fixed and isinstance(args[0], Tensor) and passage.is_early(args[0]):
            return self._write_early(func, name, args, kwargs)
        outputs = func(*args[:fixed], *passage.gather(tuple(args[fixed:])), **passage.gather(dict(kwargs)))
        passage.own(outputs, passage.stage)
        passage.came_late(outputs)
        return outputs

    def _write_early(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """Change a tensor of another device where it is: it has to be that very tensor."""
        if self._passage.is_cut(args[0]):
            raise RuntimeError(
                f"{name} changes a tensor of an earlier stage in place, between the blocks of a later one, "
                "where its gradient would be lost: make a new tensor instead"
            )
        outputs = func(*args, **kwargs)
        self._passage.came_late((args[0], outputs))
        return outputs


@contextmanager
def without_strays() -> Iterator[None]:
    """Modules need no such help: their inputs arrive with them. Nor can compiled ones know of it."""
    if isinstance(_get_current_function_mode(), Strays):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument in place."""
    in_place = name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    return name == "__setitem__" or in_place or (name.endswith("_") and not name.endswith("__"))
