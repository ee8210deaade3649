"""The micro-batches that are under way through a split model, each known to the thread that carries it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from tworeel.engine.passage import Gate, Passage
from tworeel.engine.placement import Placement


class UnderWay:
    """The open passages of a split model.

    Args:
        placement: of the model.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._here = threading.local()
        self._open: set[Passage] = set()

    @contextmanager
    def passage(self, gate: Gate | None = None) -> Iterator[Passage]:
        """Open the way of one micro-batch; the model's forward on this thread runs along it."""
        passage = Passage(self._placement.devices, gate)
        self._open.add(passage)
        self._here.passage = passage
        try:
            yield passage
        finally:
            self._here.passage = None
            self._open.discard(passage)

    @property
    def in_pipeline(self) -> bool:
        """Whether a pipeline's micro-batches are under way, of which other threads carry some."""
        return not all(passage.is_alone for passage in tuple(self._open))

    def current(self) -> Passage | None:
        """This thread's passage while its forward runs."""
        passage = getattr(self._here, "passage", None)
        return None if passage is None or passage.done else passage

    def recall(self, stage: int, inputs: Any) -> Any:
        """Inputs of a module that runs outside of a forward: another library's recomputation, or alone.

        A recomputation runs in threads of autograd's own, which know nothing of the micro-batch; but its
        inputs are the very tensors of the forward, and what stood for them then must stand for them now.
        """
        device = self._placement.devices[stage]

        def recall(tensor: Tensor) -> Tensor:
            stand_ins = (passage.recall(tensor, stage) for passage in tuple(self._open))
            known = next((s for s in stand_ins if s is not None), None)
            return tensor.to(device) if known is None else known

        return tree_map_only(Tensor, recall, inputs)
