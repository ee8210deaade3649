"""One stage while it is planned: what it has, and what its blocks may leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tworeel.engine.fitting import (
    Fit,
    StageMemory,
    fit_as,
    needed,
    parked_bytes,
    ways_to_fit,
)
from tworeel.engine.footprints import Footprints, StageFootprints
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.engine.split import AUTO
from tworeel.engine.weight_streaming import Streamed, more_and_more_streamed, spread
from tworeel.planning.budgets import Budget
from tworeel.planning.plans import StagePlan
from tworeel.planning.timing import PARKING_KERNELS
from tworeel.planning.traces import BlockTrace
from tworeel.planning.work import Work
from tworeel.units import GIB

WORKSPACES = int(0.3 * GIB)
"""Of matrix products and attentions, beside what a trace sees; measured on H100s."""


@dataclass(frozen=True)
class Means:
    """The average clip, relative to the largest: of what grows with tokens, and with their square."""

    linear: float
    square: float

    def of(self, work: Work) -> Work:
        """The work for the average clip, from that for the largest."""
        return Work(
            {dtype: count * self.linear for dtype, count in work.products.items()},
            work.attention * self.square,
            work.traffic * self.linear,
            work.kernels,
            work.weights,
        )


@dataclass(frozen=True, kw_only=True)
class StageDraft:
    """A stage before it is decided what its blocks leave behind. Sizes in bytes."""

    budget: Budget
    blocks: range
    traces: Sequence[BlockTrace]
    """Of each block."""
    sizes: Sequence[int]
    """Frozen weights of each block."""
    weights: int
    lora: int
    """Weights, gradients and what the optimizer keeps."""
    inputs: int
    """What a micro-batch brings beside the hidden state."""
    head: int
    """What the model takes behind its last block, if the stage has that."""
    dequantized: int
    """One weight that is dequantized for its use, where no trace sees it."""
    spare: int
    """Left alone: the allocator's rounding and gaps."""
    free: int
    context: int | None
    """What driver and CUDA take beside that; None where the device is here."""
    shared: int
    """Stages on the device, of which each has an equal part of it."""
    held: Held
    """Of micro-batches, at a time."""
    residency: str
    """As it is asked for."""
    streamed: int | None
    """Blocks whose weights are to be streamed; None leaves that open."""
    means: Means
    """Of the data."""

    @cached_property
    def streaming(self) -> list[Streamed]:
        """What it means that the weights of 0, 1, … of its blocks are streamed."""
        return more_and_more_streamed(self.sizes)

    @cached_property
    def ways(self) -> list[Fit]:
        """What its blocks may leave behind, best first, with less and less of the host."""
        memory = self._memory(self.streamed or 0)
        if self.residency == AUTO:
            return ways_to_fit(memory, self._footprints)
        if self.residency == Residency.KEEP:
            return [Fit(memory.may_keep, Residency.SELECTIVE, memory.streamed)]
        fallback = Residency(self.residency)
        never = replace(memory, may_keep=0)
        return [fit_as(fallback, never, StageFootprints(self._as_run(fallback)))]

    @cached_property
    def plans(self) -> list[StagePlan]:
        """The stage as each of its ways would have it run."""
        return [self.decide(fit) for fit in self.ways]

    def _memory(self, streamed: int) -> StageMemory:
        """What its activations may take when the weights of so many blocks are streamed."""
        return StageMemory(
            available=self.free - self.spare - self._on_device(streamed) - self.lora - self._workspace,
            num_blocks=len(self.blocks),
            may_keep=len(self.blocks) - streamed,
            held=self.held,
            inputs=self.inputs,
            last_streamed=spread(range(len(self.blocks)), streamed)[-1] if streamed else -1,
            streamed=streamed,
            streaming=self.streaming if self.streamed is None else (Streamed(),),
            head=self.head,
        )

    def _on_device(self, streamed: int) -> int:
        """Bytes of weights on the device when those of so many blocks are streamed."""
        return self.weights - self.streaming[streamed].freed

    @property
    def _workspace(self) -> int:
        return WORKSPACES + self.dequantized

    @property
    def _footprints(self) -> StageFootprints:
        """Of its blocks; the engine may let another one keep all where some are streamed."""
        return StageFootprints([trace.footprints for trace in self.traces])

    def decide(self, fit: Fit) -> StagePlan:
        """The stage as it is run when its blocks leave that behind."""
        streamed, memory = fit.streamed, self._memory(fit.streamed)
        kept = min(fit.num_kept, memory.may_keep)
        blocks = self._as_run(fit.fallback)
        resting = [{key: replace(found, working=0) for key, found in one.items()} for one in blocks]
        at_rest, footprints = StageFootprints(resting), StageFootprints(blocks)
        rest = needed(replace(memory, head=0), at_rest, kept, fit.fallback)
        less = needed(replace(memory, head=0, held=self._held_with_one_fewer()), at_rest, kept, fit.fallback)
        working = needed(memory, footprints, kept, fit.fallback) - rest
        crossing, inputs = self.held.waiting * footprints.hidden, self.held.given * self.inputs
        forward, backward, computing = self._seconds(kept, fit.fallback, streamed)
        forward_kernels, backward_kernels = self._kernels(kept, fit.fallback)
        return StagePlan(
            device=self.budget.device,
            card=self.budget.card,
            first=self.blocks[0],
            last=self.blocks[-1],
            kept=kept,
            residency=fit.fallback,
            streamed=streamed,
            in_flight=self.held.in_flight,
            host=self.streaming[streamed].pinned + parked_bytes(memory, footprints, kept, fit.fallback),
            parts={
                "weights": self._on_device(streamed),
                "LoRA, gradients, optimizer": self.lora,
                "activations": rest - crossing - inputs,
                "workspace": working + self._workspace,
                "crossing buffers": crossing,
                "inputs": inputs,
            },
            # Gradients may wait all the same.
            of_each=rest - less - footprints.hidden,
            spare=self.spare,
            free=self.free,
            context=self.context,
            shared=self.shared,
            forward=forward,
            backward=backward,
            computing=computing,
            forward_kernels=forward_kernels,
            backward_kernels=backward_kernels,
        )

    def _held_with_one_fewer(self) -> Held:
        """While it works on one micro-batch fewer: a later stage may have that one's inputs all the same."""
        in_flight, given, waiting = self.held
        first = self.blocks[0] == 0
        return Held(in_flight - 1, given - first, waiting - first)

    def _as_run(self, fallback: Residency) -> list[Footprints]:
        """Footprints by the names that `needed` looks for: what does not keep all stands for `SELECTIVE`."""
        kind = _traced_as(fallback)
        return [
            {Residency.KEEP: t.footprints[Residency.KEEP], Residency.SELECTIVE: t.footprints[kind]}
            for t in self.traces
        ]

    def _seconds(self, kept: int, fallback: Residency, streamed: int) -> tuple[float, float, float]:
        """Forward and backward of the average clip, and what both would take without copies.

        What a block parks travels beside its neighbour's work, streamed weights beside the work of all; what
        takes longer counts. Both directions of a link are used at a time.
        """
        rates, kind, means = self.budget.rates, _traced_as(fallback), self.means
        forward = backward = computing = parked = 0.0
        again = len(self._again(kept))
        for i, trace in enumerate(self.traces):
            ahead = rates.forward(means.of(trace.forward))
            back = rates.backward(means.of(trace.backward))
            if i < again:
                back += rates.forward(means.of(trace.recomputed[kind]))
            computing += ahead + back
            if i < again and fallback.is_parked:
                copy = trace.footprints[kind].kept * means.linear / rates.host
                ahead, back, parked = max(ahead, copy), max(back, copy), parked + copy
            forward += ahead
            backward += back
        brought = sum(spread(self.sizes, streamed)) / rates.host
        return max(forward, brought), max(backward, brought + parked), computing

    def _kernels(self, kept: int, fallback: Residency) -> tuple[int, int]:
        """Launched for a micro-batch's forward and backward, and what else the host does, in as many."""
        again, kind = self._again(kept), _traced_as(fallback)
        moving = PARKING_KERNELS * len(again) // 2 if fallback.is_parked else 0
        forward = sum(trace.forward.kernels for trace in self.traces)
        backward = sum(trace.backward.kernels for trace in self.traces)
        return forward + moving, backward + moving + sum(trace.recomputed[kind].kernels for trace in again)

    def _again(self, kept: int) -> Sequence[BlockTrace]:
        """The blocks that compute again."""
        return self.traces[: len(self.traces) - kept]


def _traced_as(fallback: Residency) -> Residency:
    """What was traced for it: that activations are parked changes nothing of a block's work."""
    return Residency.SELECTIVE if fallback.is_selective else Residency.RECOMPUTE
