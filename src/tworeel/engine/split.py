"""Spread a model over devices from outside, without touching its code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tworeel.engine.passage import Gate, Passage
from tworeel.engine.placement import Placement, Unit, place
from tworeel.engine.residency import Residency, refuse_dropout, run_block


def split(
    model: nn.Module,
    devices: Sequence[str | torch.device],
    *,
    at: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    residency: Residency | str = Residency.KEEP,
) -> Split:
    """Spread `model`'s blocks over `devices`; its forward and backward then work as before.

    Any training loop goes on unchanged: tensors cross between devices by themselves, one micro-batch at a
    time. Give the result to `Pipeline` to keep all devices busy at once. What comes before the blocks lives
    on the first device, what comes after them on the last. The model's blocks are moved in place.

    Args:
        model: any module whose forward runs one or more lists of blocks, each block once and in order.
        devices: one device a stage, for example `["cuda:0", "cuda:1"]`; a device may stand more than once.
        at: first block of each stage after the first, for example `[20]`; even shares by default.
        blocks: dotted names of the block lists, for example `["blocks"]`; found by themselves by default.
        residency: what each block leaves behind for its backward.

    Raises:
        ValueError: no block lists, more stages than blocks, boundaries out of order, the model is split
            already.

    Example:
        >>> split(transformer, ["cuda:0", "cuda:1"])
        >>> loss = mse(transformer(x, t, text), target)
        >>> loss.backward()
    """
    if find_split(model) is not None:
        raise ValueError(f"{type(model).__name__} is split already: call .remove() on its split first")
    placement = place(model, devices, at=at, blocks=blocks)
    _move(model, placement)
    return Split(model, placement, Residency(residency))


def find_split(model: nn.Module) -> Split | None:
    """The split that `model` runs under, if any."""
    return getattr(model.__dict__.get("forward"), "split", None)


class Split:
    """A model that runs over several stages. Made by `split`.

    Attributes:
        model: the model itself.
        placement: which unit runs on which stage and device.
        residency: what each block leaves behind for its backward.
    """

    def __init__(self, model: nn.Module, placement: Placement, residency: Residency) -> None:
        self.model = model
        self.placement = placement
        self.residency = residency
        self._here = threading.local()
        self._open: set[Passage] = set()
        self._wrapped: list[nn.Module] = []
        for unit in placement.units:
            self._wrap(model.get_submodule(unit.name), partial(self._staged, unit))
        self._wrap(model, self._rooted)

    def remove(self) -> None:
        """Let the model's modules run as they did before; they stay on their devices."""
        for module in self._wrapped:
            del module.forward
        self._wrapped.clear()

    def refuse_dropout(self) -> None:
        """Raise ValueError if a block draws random numbers that a recomputation would not draw again."""
        if self.residency is not Residency.KEEP:
            for unit in self.placement.units:
                if unit.is_block:
                    refuse_dropout(unit.name, self.model.get_submodule(unit.name))

    @contextmanager
    def passage(self, gate: Gate | None = None) -> Iterator[Passage]:
        """Open the way of one micro-batch; the model's forward on this thread runs along it."""
        passage = Passage(self.placement.devices, gate)
        self._open.add(passage)
        self._here.passage = passage
        try:
            yield passage
        finally:
            self._here.passage = None
            self._open.discard(passage)

    def _wrap(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        if "forward" in module.__dict__:
            raise ValueError(
                f"{type(module).__name__}.forward is replaced already, by another library's hooks"
            )
        module.forward = make(module.forward)
        self._wrapped.append(module)

    def _rooted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def root(*args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                with self.passage() as alone:
                    return run(alone, args, kwargs)
            return run(passage, args, kwargs)

        def run(passage: Passage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if passage.stage > 0:
                raise RuntimeError("the model ran twice in one micro-batch: give each run its own")
            args, kwargs = passage.arrive(0, (args, kwargs), block=False)
            return forward(*args, **kwargs)

        root.split = self  # type: ignore[attr-defined]
        return root

    def _staged(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        device = self.placement.devices[unit.stage]

        def staged(*args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                args, kwargs = self._recall(unit.stage, (args, kwargs))
                return forward(*args, **kwargs)
            args, kwargs = passage.arrive(unit.stage, (args, kwargs), block=unit.is_block)
            if unit.is_block:
                return run_block(forward, args, kwargs, residency=self.residency, device=device)
            return passage.leave_prologue(forward(*args, **kwargs))

        return staged

    def _current(self) -> Passage | None:
        """This thread's passage while its forward runs."""
        passage = getattr(self._here, "passage", None)
        return None if passage is None or passage.done else passage

    def _recall(self, stage: int, inputs: Any) -> Any:
        """Inputs of a module that runs outside of a forward: another library's recomputation, or alone.

        A recomputation runs in threads of autograd's own, which know nothing of the micro-batch; but its
        inputs are the very tensors of the forward, and what stood for them then must stand for them now.
        """
        device = self.placement.devices[stage]

        def recall(tensor: Tensor) -> Tensor:
            stand_ins = (passage.recall(tensor, stage) for passage in tuple(self._open))
            known = next((s for s in stand_ins if s is not None), None)
            return tensor.to(device) if known is None else known

        return tree_map_only(Tensor, recall, inputs)


def _move(model: nn.Module, placement: Placement) -> None:
    """Move every parameter and buffer to its stage's device."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(placement.device_of(name))
