"""What diffusers' pipelines are given as their transformers.

A split model lives on several devices, in several precisions, and may be in the middle of a training; a
pipeline wants one module on one device. And of two experts only one is loaded at a time: the pipeline runs
once for each. At first it breaks off where it comes to the second expert; then it runs again, the first
expert's answers are remembered, and the second one goes on from there. Nothing of a sampler's state has to be
carried over, and the result is the same to the bit as with both loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tworeel.engine import Split, infer

Answer = Callable[..., Any]
"""What the transformer's forward would take -> what it would return."""


class NotYet(Exception):
    """The pipeline has come to a transformer that is not loaded."""


class StandIn(nn.Module):
    """Stands for a transformer.

    Args:
        config: of the transformer.
        device: that the pipeline computes on.
        dtype: of the transformer's inputs.
        answer: stands for its forward.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, answer: Answer) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.dtype = dtype
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, on the pipeline's device."""
        answer = self._answer(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), answer)

    def cache_context(self, _name: str, **_state: Any) -> AbstractContextManager[None]:
        """diffusers' caches between steps are not used."""
        return nullcontext()


def loaded(split: Split, poll: Callable[[], None], memory: list[Any] | None) -> Answer:
    """Answer with a split model.

    Args:
        split: the model.
        poll: called before each forward; may raise to stop.
        memory: takes every answer, if there is one.
    """

    def answer(*args: Any, **kwargs: Any) -> Any:
        poll()
        found = infer(split, *args, **kwargs)
        if memory is not None:
            memory.append(tree_map_only(Tensor, Tensor.cpu, found))
        return found

    return answer


def remembered(memory: list[Any]) -> Answer:
    """Give the answers again that were given before, in their order."""
    answers = iter(memory)
    return lambda *args, **kwargs: next(answers)


def missing(*args: Any, **kwargs: Any) -> Any:
    """Break off."""
    raise NotYet
