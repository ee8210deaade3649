"""Modules that treat some tokens at a time, with upstream's numbers and less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PART_BYTES = 64 * 2**20
"""Of a hidden state's part in fp32: little memory, and large enough that launching it costs no time."""


class PerToken(nn.Module):
    """A module whose forward takes its tokens part by part, unless it is asked to run as upstream's."""

    whole: ClassVar[bool] = False

    @property
    def divides(self) -> bool:
        """Whether it takes them so now: what is compiled needs no help."""
        return not self.whole and not torch.compiler.is_compiling()


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Let a model's modules run as upstream's do: to trace them for a compiler, or to compare."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PerToken)]
    for module in modules:
        module.whole = True
    try:
        yield
    finally:
        for module in modules:
            del module.whole


def parts(hidden: Tensor) -> list[slice]:
    """The tokens of a hidden state, of shape (B, tokens, ...), in parts of at most `PART_BYTES` in fp32."""
    tokens = hidden.shape[1]
    count = max(1, -(-hidden.numel() * torch.float32.itemsize // PART_BYTES))
    rows = -(-tokens // count)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]
