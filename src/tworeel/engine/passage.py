"""One micro-batch's way through the stages: the bridge between them, and the backward stage by stage.

The model's own forward runs unchanged. Where a module of a later stage gets a tensor of an earlier one, the
tensor is brought to the later stage's device. In a pipeline, a tensor that needs a gradient is also cut
there: the later stage works on a leaf, and the pair (source, leaf) is remembered. The backward then goes
from the last stage to the first, each stage from the gradients that arrived at its leaves, so that the
backwards and forwards of different micro-batches can take turns.

A stage is a number, not a device: two stages may share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


class Gate(Protocol):
    """Asked before a micro-batch goes on to the next stage."""

    def advance(self, stage: int, to: int) -> None: ...


class Cut(NamedTuple):
    """A place where the graph was cut: `leaf` stands for `source` on a later stage."""

    source: Tensor
    leaf: Tensor


class Passage:
    """Where one micro-batch is, what stands for its tensors on which stage, and where its graph was cut.

    Without a gate (`tworeel.split` alone) nothing is cut: one backward through the whole graph does it all.
    """

    def __init__(self, devices: Sequence[torch.device], gate: Gate | None = None) -> None:
        self.stage = 0
        self.done = False
        self._devices = devices
        self._gate = gate
        self._blocks_reached = False
        self._owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._stand_ins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._crossings: list[list[Cut]] = [[] for _ in devices]
        self._prologue: list[list[Cut]] = []

    def arrive(self, stage: int, inputs: Any, *, block: bool) -> Any:
        """Go on to `stage` if it is a later one, and return `inputs` as they stand on its device.

        Args:
            stage: stage of the module that is about to run.
            inputs: any nesting of tuples, lists and dicts; what is not a tensor passes through.
            block: the module is one of the blocks.
        """
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self._owner.setdefault(tensor, self.stage)
        self._blocks_reached |= block
        while self.stage < stage:
            if self._gate is not None:
                self._gate.advance(self.stage, self.stage + 1)
            self.stage += 1
        return tree_map_only(Tensor, lambda tensor: self._bring(tensor, stage), inputs)

    def leave_prologue(self, outputs: Any) -> Any:
        """Cut what a module before the blocks has made, so that several stages can use it.

        Only trainable modules are affected: what needs no gradient is not cut.
        """
        if self._gate is None or self._blocks_reached:
            return outputs
        cuts: list[Cut] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            cuts.append(Cut(tensor, tensor.detach().requires_grad_()))
            return cuts[-1].leaf

        outputs = tree_map_only(Tensor, cut, outputs)
        if cuts:
            self._prologue.append(cuts)
        return outputs

    def recall(self, tensor: Tensor, stage: int) -> Tensor | None:
        """What stands for `tensor` on `stage`, if anything does (asked during a foreign recomputation)."""
        return self._stand_ins.get(tensor, {}).get(stage)

    def backward(self, stage: int, loss: Tensor | None = None) -> None:
        """Run the backward of one stage; the last stage's starts from `loss`.

        Raises:
            RuntimeError: whatever autograd raises; with a note if a tensor went from stage to stage uncut.
        """
        try:
            _backward(self._crossings[stage], loss)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                error.add_note(
                    f"stage {stage}: the forward uses a tensor of an earlier stage between its blocks "
                    "and modules, where it is not cut; make that code a module of its own"
                )
            raise
        self._crossings[stage].clear()
        if stage == 0:
            for cuts in reversed(self._prologue):
                _backward(cuts)
            self._prologue.clear()

    def _bring(self, tensor: Tensor, stage: int) -> Tensor:
        owner, device = self._owner[tensor], self._devices[stage]
        cut = self._gate is not None and tensor.requires_grad and owner < stage
        if not cut and tensor.device == device:
            return tensor
        known = self._stand_ins.setdefault(tensor, {})
        if stage not in known:
            known[stage] = self._cross(tensor, owner, device) if cut else send(tensor, device)
        return known[stage]

    def _cross(self, tensor: Tensor, owner: int, device: torch.device) -> Tensor:
        leaf = send(tensor.detach(), device).requires_grad_()
        self._crossings[owner].append(Cut(tensor, leaf))
        return leaf


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to another device without making the host wait for what is queued there."""
    if tensor.device.type == "cpu" and device.type != "cpu":
        # From pageable memory the driver would first drain the device's stream.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


def _backward(cuts: Sequence[Cut], loss: Tensor | None = None) -> None:
    """Backward from `loss` and from the sources of those cuts whose leaves have a gradient by now."""
    sources: list[Tensor] = [] if loss is None else [loss]
    gradients: list[Tensor | None] = [None] * len(sources)
    for source, leaf in cuts:
        if leaf.grad is not None:
            sources.append(source)
            gradients.append(send(leaf.grad, source.device))
            leaf.grad = None
    if sources:
        torch.autograd.backward(sources, gradients)
