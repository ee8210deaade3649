"""How the tensors of a file become a model's parameters: by another name, or by some of their rows.

Files may hold several layers as one ("fused"), or halves in another order:

    qkv -> (Rows("to_q", (0,), of=3), Rows("to_k", (1,), of=3), Rows("to_v", (2,), of=3))
    adaLN -> (Rows("norm_out", (1, 0), of=2),)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tworeel.weights.tensor_files import TensorInfo


@dataclass(frozen=True)
class Rows:
    """A parameter made of some of a tensor's rows."""

    name: str
    """Of the parameter."""
    parts: tuple[int, ...]
    """Which of the equal parts of the tensor's rows it consists of, in this order."""
    of: int
    """How many equal parts the tensor has."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the tensor as it stands in the file."""
        return self.parts == tuple(range(self.of))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...] | None:
        """The parameter's shape, from the tensor's; None if that has no such parts."""
        if self.is_whole:
            return whole
        if not whole or whole[0] % self.of:
            return None
        return (whole[0] // self.of * len(self.parts), *whole[1:])

    def ranges(self, whole: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
        """The tensor's rows (first, behind the last) in the order of the parameter; None for all of them."""
        if self.is_whole:
            return None
        size = whole[0] // self.of
        return tuple((part * size, (part + 1) * size) for part in self.parts)


Names = str | tuple[Rows, ...] | None
"""What a key stands for: a parameter, rows of one or several parameters, or nothing."""
NameOf = Callable[[str], Names]


def rows_of(names: Names) -> tuple[Rows, ...]:
    """What a key stands for, in one form."""
    if names is None:
        return ()
    return (Rows(names, (0,), 1),) if isinstance(names, str) else names


def shapes_by_name(names: Mapping[str, TensorInfo], name_of: NameOf) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that a file's tensors make; uneven parts are left out."""
    found = (
        (rows.name, rows.shape(info.shape)) for key, info in names.items() for rows in rows_of(name_of(key))
    )
    return {name: shape for name, shape in found if shape is not None}
