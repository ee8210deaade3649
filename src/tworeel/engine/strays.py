"""Code between the blocks that uses tensors from before an earlier block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from tworeel.engine.passage import Passage


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
        if passage.inside or passage.done or name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        # What is written to has to be that very tensor; a copy would not do.
        fixed = 1 if _writes(name) else 0
        outputs = func(*args[:fixed], *passage.gather(tuple(args[fixed:])), **passage.gather(dict(kwargs)))
        passage.own(outputs, passage.stage)
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
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
