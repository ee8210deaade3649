"""One micro-batch's way through the stages: the bridge between them, and the backward stage by stage.

The model's own forward runs unchanged. Where a module of a later stage gets a tensor of an earlier one, the
tensor is brought to the later stage's device. In a pipeline, a tensor that needs a gradient is also cut
there: the later stage's graph begins with what stands for it, and where its gradient belongs is remembered.
The backward then goes from the last stage to the first, each stage from the gradients that arrived at the
cuts behind it, so that the backwards and forwards of different micro-batches can take turns.

A stage is a number, not a device: two stages may share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from tworeel.engine.parking import Berth
from tworeel.engine.streams import Arrival, mark, start_copy


class Gate(Protocol):
    """Asked before a micro-batch goes on to the next stage."""

    def advance(self, stage: int, to: int) -> None: ...


class Cut:
    """A place where the graph was cut: a later stage works with a tensor of its own in `tensor`'s place.

    Neither is held, only where their gradient comes from and goes to: backwards need no values of them.

    Args:
        tensor: of an earlier stage.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.source = get_gradient_edge(tensor)
        self._device = tensor.device
        self._found: Tensor | None = None
        self._sent: Arrival | None = None

    def begin(self, there: Tensor) -> Tensor:
        """Let the later stage's graph begin with a tensor that needs no gradient so far."""
        with torch.enable_grad():
            return _Beginning.apply(there, torch.empty(0, requires_grad=True), self)

    def found(self, gradient: Tensor) -> None:
        """Take the gradient that one backward has come to; before the blocks several may."""
        self._found = gradient if self._found is None else self._found + gradient

    def send_gradient(self) -> None:
        """Begin to send that back, if there is one by now: the later stage is done with it."""
        if self._found is not None:
            self._sent = start_copy(self._found, self._device)
            self._found = None

    def gradient(self) -> Tensor | None:
        """What was sent, on the device of the earlier stage."""
        return None if self._sent is None else self._sent.wait()


class _Beginning(torch.autograd.Function):
    """The first node of a later stage's graph; a leaf would keep the tensor for as long as the graph is."""

    @staticmethod
    def forward(ctx: Any, there: Tensor, _needs_gradient: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return there.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.cut.found(*gradients)
        return None, None, None


class Passage:
    """Where one micro-batch is, what stands for its tensors on which stage, and where its graph was cut.

    Without a gate (`tworeel.split` alone) nothing is cut: one backward through the whole graph does it all.
    """

    def __init__(self, devices: Sequence[torch.device], gate: Gate | None = None) -> None:
        self.stage = 0
        self.done = False
        self.inside = 0
        """How deep in modules of the placement the forward is; 0 in the code between them."""
        self.berths: dict[int, Berth | None] = {}
        """What the last block on each stage has parked in host memory, if it has."""
        self._devices = devices
        self._gate = gate
        self._blocks_reached = False
        self._left: dict[torch.device, torch.Event] = {}
        self._owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._under_way: dict[tuple[int, int], Arrival] = {}
        self._stand_ins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._left_behind: list[list[Cut]] = [[] for _ in devices]
        self._entered: list[list[Cut]] = [[] for _ in devices]
        self._prologue: list[list[Cut]] = []

    @property
    def is_alone(self) -> bool:
        """Whether no other micro-batch runs at the same time."""
        return self._gate is None

    def arrive(self, stage: int, inputs: Any, *, block: bool) -> Any:
        """Go on to `stage` if it is a later one, and return `inputs` as they stand on its device.

        Args:
            stage: stage of the module that is about to run.
            inputs: any nesting of tuples, lists and dicts; what is not a tensor passes through.
            block: the module is one of the blocks.
        """
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._owner.setdefault(tensor, self.stage)
        self._blocks_reached |= block
        if self.stage < stage:
            # Before the gate: while this micro-batch waits for its turn, its tensors are under way.
            self._depart(tensors, stage)
        while self.stage < stage:
            if self._gate is not None:
                self._gate.advance(self.stage, self.stage + 1)
            self.stage += 1
        inputs = tree_map_only(Tensor, lambda tensor: self._bring(tensor, stage), inputs)
        self._under_way.clear()
        return inputs

    @contextmanager
    def within(self) -> Iterator[None]:
        """A module of the placement runs, or its inputs are on their way: that is not code between blocks."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def own(self, outputs: Any, stage: int) -> None:
        """Remember that `outputs` were made on `stage`: used on a later one, they are cut."""
        if self._gate is None:
            return
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._owner.setdefault(tensor, stage)

    def inherit(self, part: Any, whole: Tensor) -> None:
        """Remember that `part`, a view of `whole`, is of the stage that `whole` is of."""
        if isinstance(part, Tensor) and (owner := self._owner.get(whole)) is not None:
            self._owner.setdefault(part, owner)

    def comes_back(self, stage: int) -> None:
        """A module of a stage that was left runs: what is on its device now is later than the leaving."""
        if stage < self.stage:
            for one in (stage, self.stage):
                self._left.pop(self._devices[one], None)

    def is_early(self, tensor: Tensor) -> bool:
        """Whether something else stands, or would have to, for `tensor` on the current stage."""
        if tensor.device != self._devices[self.stage]:
            return True
        return self.is_cut(tensor) and self._owner.get(tensor, self.stage) < self.stage

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether the graph is cut where a later stage than its own uses `tensor`."""
        return self._gate is not None and tensor.requires_grad

    def came_late(self, written: Any) -> None:
        """What was written between modules, on whatever device: on another one than the stage's it is new."""
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor) and tensor.device != self._devices[self.stage]:
                self._left.pop(tensor.device, None)
                self._stand_ins.pop(tensor, None)

    def gather(self, inputs: Any) -> Any:
        """Return `inputs` of an operation between the blocks as they stand on the stage where it runs.

        A tensor on a device of no stage, say a scheduler's table in host memory, stays there. A device of
        another stage is that of a tensor from there: it becomes this stage's, where that tensor is used.
        """

        def bring(given: Any) -> Any:
            if isinstance(given, torch.device) and given in self._devices:
                return self._devices[self.stage]
            if isinstance(given, Tensor) and (given.device in self._devices or given.requires_grad):
                # A parameter of several stages has its gradient from one: in one order.
                self._owner.setdefault(given, 0 if isinstance(given, nn.Parameter) else self.stage)
                return self._bring(given, self.stage)
            return given

        return tree_map(bring, inputs) if self.stage > 0 else inputs

    def leave_prologue(self, outputs: Any) -> Any:
        """Cut what a module before the blocks has made, so that several stages can use it.

        Only trainable modules are affected: what needs no gradient is not cut.
        """
        if self._gate is None or self._blocks_reached:
            return outputs
        cuts: list[Cut] = []

        def begin(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            cuts.append(cut := Cut(tensor))
            return cut.begin(tensor.detach())

        outputs = tree_map_only(Tensor, begin, outputs)
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
            if loss is not None:
                loss.backward()
            else:
                _backward(self._left_behind[stage])
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                error.add_note(
                    f"stage {stage}: the forward uses a tensor of an earlier stage between its blocks "
                    "and modules, where it is not cut; make that code a module of its own"
                )
            raise
        self._left_behind[stage].clear()
        for cut in self._entered[stage]:
            cut.send_gradient()
        self._entered[stage].clear()
        for known in self._stand_ins.values():
            known.pop(stage, None)
        if stage == 0:
            for cuts in reversed(self._prologue):
                for cut in cuts:
                    cut.send_gradient()
                _backward(cuts)
            self._prologue.clear()

    def _depart(self, tensors: Sequence[Tensor], stage: int) -> None:
        here, device = self._devices[self.stage], self._devices[stage]
        if here.type != "cpu":
            self._left[here] = mark(here)
        for tensor in tensors:
            is_there = tensor.device == device or stage in self._stand_ins.get(tensor, {})
            if self._may_cut(tensor) and not is_there and (id(tensor), stage) not in self._under_way:
                self._under_way[id(tensor), stage] = self._send(self._nearest(tensor, stage).detach(), device)

    def _nearest(self, tensor: Tensor, stage: int) -> Tensor:
        """What a copy for `stage` is made from.

        For a constant, what stands for it on the stage's device, or on the latest stage before.
        """
        known = {} if tensor.requires_grad else self._stand_ins.get(tensor, {})
        device = self._devices[stage]
        there = (stand_in for stand_in in known.values() if stand_in.device == device)
        latest = known[max(known)] if known else tensor
        return next(there, latest)

    def _may_cut(self, tensor: Tensor) -> bool:
        """Without a gate, what needs a gradient has to stay one graph."""
        return self._gate is not None or not tensor.requires_grad

    def _bring(self, tensor: Tensor, stage: int) -> Tensor:
        owner, device = self._owner[tensor], self._devices[stage]
        is_cut = self.is_cut(tensor) and owner < stage
        if not is_cut and tensor.device == device:
            return tensor
        known = self._stand_ins.setdefault(tensor, {})
        if stage not in known:
            known[stage] = self._cross(tensor, owner, stage) if is_cut else self._carry(tensor, stage)
        return known[stage]

    def _cross(self, tensor: Tensor, owner: int, stage: int) -> Tensor:
        cut = Cut(tensor)
        self._left_behind[owner].append(cut)
        self._entered[stage].append(cut)
        return cut.begin(self._carry(tensor.detach(), stage, id(tensor)))

    def _carry(self, tensor: Tensor, stage: int, identity: int | None = None) -> Tensor:
        """The tensor on the stage's device."""
        if not self._may_cut(tensor):
            return tensor.to(self._devices[stage])
        arrival = self._under_way.get((identity or id(tensor), stage))
        if arrival is None:
            arrival = self._send(self._nearest(tensor, stage), self._devices[stage], late=True)
        return arrival.wait()

    def _send(self, tensor: Tensor, device: torch.device, *, late: bool = False) -> Arrival:
        """Begin to copy a tensor of a stage that this micro-batch has left.

        Not behind what other micro-batches compute there since.
        """
        return start_copy(tensor, device, self._left.get(tensor.device), late=late)


def _backward(cuts: Sequence[Cut]) -> None:
    """Backward from where gradients have come back to."""
    arrived = [(cut.source, gradient) for cut in cuts if (gradient := cut.gradient()) is not None]
    if arrived:
        sources, gradients = zip(*arrived, strict=True)
        torch.autograd.backward(sources, gradients)
