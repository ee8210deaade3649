"""Modules that take less memory than upstream's where they are not compiled, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn


class Lean(nn.Module):
    """A module with a forward of ours beside upstream's."""

    as_upstream: ClassVar[bool] = False

    @property
    def is_lean(self) -> bool:
        """Whether ours is to run: what is compiled needs no help."""
        return not self.as_upstream and not torch.compiler.is_compiling()


@contextmanager
def upstream_forwards(model: nn.Module) -> Iterator[None]:
    """Let a model's modules run by upstream's forwards: to trace them for a compiler, or to compare."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, Lean)]
    for module in modules:
        module.as_upstream = True
    try:
        yield
    finally:
        for module in modules:
            del module.as_upstream
