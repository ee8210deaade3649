"""Finds the split that is fastest of those that fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tworeel.data.buckets import block_tokens, tokens
from tworeel.data.clips import Bucket
from tworeel.engine.compiling import rounds_as_written
from tworeel.engine.fitting import SPARE, leaner_and_leaner
from tworeel.engine.placement import Placement, place
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held, Order, at_work, make_orders, most_held, most_in_flight
from tworeel.engine.streamed_blocks import streamed_positions
from tworeel.planning.boundaries import Way, is_rising, neighbours, shares, within_host
from tworeel.planning.budgets import Budget
from tworeel.planning.drafts import Means, StageDraft
from tworeel.planning.measured_bytes import with_measured
from tworeel.planning.orders import distinct_orders
from tworeel.planning.plans import NEARLY, Plan, StagePlan, rank
from tworeel.planning.requests import Request
from tworeel.planning.timing import CPP_LAUNCH_SECONDS, LAUNCH_SECONDS, simulate
from tworeel.planning.traces import STORED_ONLY, ModelTrace, TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.planning.weights import UnitBytes, unit_bytes

HOST_BOUND = 1.1
"""Times as long as its card works that a stage takes, where the host is what limits."""
MOST_PLAYED = 256
"""Micro-batches of a step that are played through; more of them go on in the same way."""
MOST_SEARCHED = 4
"""Orders of unlike devices for which boundaries are searched, by how the search would begin."""

_Traces = dict[tuple[Bucket, TraceSettings, bool], ModelTrace]
"""By clip, settings, and whether blocks are launched from C++."""


class Planner:
    """Weighs the ways to run one request.

    Args:
        request: what is to be planned.
        trace: what its blocks cost, if that is known.
        like: a planner for the same model: what it has found out of the model is not found out again.

    Attributes:
        largest: the bucket of most tokens, for which memory is planned.
    """

    def __init__(
        self, request: Request, trace: ModelTrace | None = None, like: Planner | None = None
    ) -> None:
        self.request = request
        self._known_trace = trace
        self._drafts: dict[tuple[object, ...], StageDraft] = {}
        self._traces: _Traces = {} if like is None else like._traces
        if like is None:
            self._model = request.family.build_transformer(request.source.transformer)
        else:
            self._model = like._model
        if like is None or like.request.trace != request.trace:
            self._units = unit_bytes(self._model, request.family, request.trace)
        else:
            self._units = like._units
        self.largest = max(request.buckets, key=lambda bucket: tokens(bucket, request.source.traits))

    @cached_property
    def trace(self) -> ModelTrace:
        """What the blocks cost for the largest clip; in bytes, what was measured where that is known."""
        if self._known_trace is not None:
            return self._known_trace
        family, source, settings = self.request.family, self.request.source, self._trace_settings
        from_cpp = self.request.cpp_wrapper and settings.exact  # of others it changes nothing
        key = (self.largest, settings, from_cpp)
        if key not in self._traces:
            self._traces[key] = trace_model(family, source, self.largest, settings, cpp_wrapper=from_cpp)
        traced = self._traces[key]
        # What is measured has a dequantized weight in it, which is counted by itself here.
        apart = all(map(self._dequantizes, self.request.budgets))
        weights = {_list_of(unit): unit.largest for unit in self._blocks} if apart else {}
        return with_measured(traced, self.request.measured, weights)

    @property
    def _trace_settings(self) -> TraceSettings:
        """What the trace depends on, beside the clip."""
        settings = self.request.trace
        exact = rounds_as_written(exact=settings.exact, quantized=settings.quantize is not None)
        settings = replace(settings, exact=exact)
        if settings.quantize in STORED_ONLY:
            settings = replace(settings, quantize=None)
        modes = {budget.mode(settings.quantize) for budget in self.request.budgets}
        # Unlike cards: the mode that needs most memory.
        mode = modes.pop() if len(modes) == 1 else "tensorwise"
        return settings if mode is None else replace(settings, mode=mode)

    @cached_property
    def weights(self) -> int:
        """Bytes of all frozen weights."""
        return sum(unit.frozen for unit in self._units)

    @property
    def has_room_for_weights(self) -> bool:
        """Whether the cards together could hold them, were there nothing else; needs no trace."""
        return self.weights <= sum(b.free - SPARE * b.total for b in self.request.budgets)

    def best(self) -> Plan:
        """The fastest plan that fits; the one that is nearest to it if none does."""
        return self.by_order[0]

    @cached_property
    def by_order(self) -> tuple[Plan, ...]:
        """The best plan of each order of the devices that is worth a search, best first."""
        request = self.request
        orders = distinct_orders(request.budgets) if request.may_reorder else [request.budgets]
        begun = sorted((self._begun(order * request.stages_per_device) for order in orders), key=_ranked)
        return tuple(sorted((self._search(*one) for one in begun[:MOST_SEARCHED]), key=rank))

    def _begun(self, stages: Sequence[Budget]) -> tuple[Sequence[Budget], Plan]:
        """Stages on devices in this order, with the best of the boundaries that a search begins with."""
        return stages, min((self._evaluate(stages, at) for at in self._starts(stages)), key=rank)

    def _search(self, stages: Sequence[Budget], begun: Plan) -> Plan:
        """The best boundaries that are reached from these, or from some that host memory is enough for."""
        if len(stages) <= 2 or self.request.split_at is not None:
            return begun
        found = self._descend(stages, begun, most=2)
        has_room = found.fits and found.host_memory < NEARLY * found.host_free
        if not has_room and (at := self._within_host(stages)) is not None:
            found = min(found, self._descend(stages, self._evaluate(stages, at), most=1), key=rank)
        return found

    def _descend(self, stages: Sequence[Budget], best: Plan, *, most: int) -> Plan:
        """From boundaries on to whatever neighbour is better: one boundary moved, or else up to `most`."""
        while True:
            for moved in range(1, most + 1):
                near = filter(self._can_stream, neighbours(best.split_at, self._num_blocks, moved))
                better = min((self._evaluate(stages, at) for at in near), key=rank, default=best)
                if rank(better) < rank(best):
                    break
            else:
                return best
            best = better

    def _within_host(self, stages: Sequence[Budget]) -> tuple[int, ...] | None:
        if self.request.streamed is not None:
            return None
        held = self._held(stages)

        def ways(stage: int, blocks: range) -> list[Way]:
            plans = self._draft(stage, stages, blocks, held[stage]).plans
            return [(plan.forward + plan.backward, plan.host) for plan in plans if plan.fits]

        return within_host(ways, len(stages), self._num_blocks, self.request.host_free)

    def _starts(self, stages: Sequence[Budget]) -> list[tuple[int, ...]]:
        """All boundaries of two stages; of more, even shares, and shares as the devices' memory and speed."""
        if self.request.split_at is not None:
            return [self.request.split_at]
        found: list[tuple[int, ...]]
        if len(stages) == 2:
            found = [(at,) for at in range(1, self._num_blocks)]
        else:
            memory, speed = [float(b.free) for b in stages], [b.rates.bf16 for b in stages]
            found = [shares(by, self._num_blocks) for by in (memory, speed)]
        even = self.even(len(stages))
        return list(dict.fromkeys(filter(self._can_stream, [even, *found]))) or [even]

    def _can_stream(self, at: tuple[int, ...]) -> bool:
        """Whether each stage has as many blocks as are to be streamed."""
        if (counts := self.request.streamed) is None:
            return True
        lengths = [last - first for first, last in itertools.pairwise((0, *at, self._num_blocks))]
        return len(counts) == len(lengths) and all(n <= has for n, has in zip(counts, lengths, strict=True))

    @cached_property
    def _blocks(self) -> list[UnitBytes]:
        return [unit for unit in self._units if unit.is_block]

    @property
    def _num_blocks(self) -> int:
        return len(self._blocks)

    def even(self, num_stages: int) -> tuple[int, ...]:
        """The boundaries of even shares of the blocks' bytes."""
        return self._place(num_stages, None).boundaries[1:-1]

    def _place(self, num_stages: int, at: Sequence[int] | None) -> Placement:
        devices = [torch.device("cpu")] * num_stages
        return place(self._model, devices, at=at, blocks=self.request.family.block_lists)

    def drafts(self, stages: Sequence[Budget], at: Sequence[int]) -> list[StageDraft]:
        """The stages with these boundaries, before it is decided what their blocks leave behind.

        Raises:
            ValueError: the boundaries are not one for each stage but the first, in rising order.
        """
        boundaries = (0, *at, self._num_blocks)
        if len(at) != len(stages) - 1 or not is_rising(boundaries):
            self._place(len(stages), at)  # says what is wrong with it
        if not self._can_stream(tuple(at)):
            streamed_positions(self._place(len(stages), at), self.request.streamed)  # the same
        held, each = self._held(stages), enumerate(itertools.pairwise(boundaries))
        return [self._draft(stage, stages, range(*ends), held[stage]) for stage, ends in each]

    def _held(self, stages: Sequence[Budget]) -> list[Held]:
        """Micro-batches that each stage holds at a time."""
        return most_held(most_in_flight(self._orders_of(stages), len(stages)))

    def assembled(self, stages: Sequence[Budget], made: Sequence[StagePlan]) -> Plan:
        """The plan of these stages, with the time of a step."""
        request = self.request
        hidden = max(trace.footprints[Residency.KEEP].hidden for trace in self.trace.blocks.values())
        devices = [budget.device for budget in stages]
        crosses = len(set(devices)) > 1
        crossing = hidden / min(budget.rates.crossing for budget in stages) if crosses else 0.0
        alone, launch = self._launching(made)
        forward = [max(stage.forward, launch * stage.forward_kernels) for stage in made]
        backward = [max(stage.backward, launch * stage.backward_kernels) for stage in made]
        orders = self._orders_of(stages)
        time = simulate(orders, forward, backward, crossing, devices=devices)
        if (more := request.micro_batches - MOST_PLAYED) > 0:
            time = time.longer(MOST_PLAYED, more, devices)
        # What all threads wait for in turns has no bubble.
        together = 0.0 if alone else launch * sum(stage.kernels for stage in made)
        step = time.at_least(request.micro_batches * together)
        longer = max(
            (f + b) / (stage.forward + stage.backward)
            for f, b, stage in zip(forward, backward, made, strict=True)
        )
        return Plan(
            model=request.source.traits.variant,
            precision=request.trace.quantize or str(request.trace.dtype).removeprefix("torch."),
            compiled=request.trace.compile,
            cpp_wrapper=request.cpp_wrapper,
            micro_batches=request.micro_batches,
            tokens=tokens(self.largest, request.source.traits),
            stages=tuple(made),
            host_memory=sum(stage.host for stage in made),
            host_free=request.host_free,
            seconds_per_step=step.seconds,
            busy=step.busy,
            host_bound=step.seconds > time.seconds or longer > HOST_BOUND,
            steps=request.steps,
            steps_per_epoch=request.clips_per_epoch / request.micro_batches,
            calibrated=all(budget.measured for budget in stages),
            measured_bytes=self.trace.measured,
            apart=_apart(orders, made, hidden),
        )

    def _launching(self, stages: Sequence[StagePlan]) -> tuple[bool, float]:
        """Whether each device's threads launch by themselves, without Python's lock; seconds of a kernel."""
        alone = self.request.cpp_wrapper and not any(map(self._repeats_attention, stages))
        seconds = CPP_LAUNCH_SECONDS if alone else LAUNCH_SECONDS[self.request.trace.compile]
        return alone, seconds * max(budget.launching or 1.0 for budget in self.request.budgets)

    def _repeats_attention(self, stage: StagePlan) -> bool:
        """Whether a compiled backward does: torch (2.11) cannot launch that from C++."""
        selective = stage.residency.is_selective and stage.kept < stage.num_blocks
        return selective and any(block.repeats_attention for block in self.trace.blocks.values())

    def _evaluate(self, stages: Sequence[Budget], at: Sequence[int]) -> Plan:
        made = self._ways(self.drafts(stages, at))
        fitting = [one for one in made if sum(s.host for s in one) <= self.request.host_free]
        return min((self.assembled(stages, one) for one in fitting or made[-1:]), key=rank)

    def _orders_of(self, stages: Sequence[Budget]) -> list[Order]:
        count = min(self.request.micro_batches, MOST_PLAYED)
        return make_orders([b.device for b in stages], count, slack=self.request.slack)

    def _draft(self, stage: int, stages: Sequence[Budget], blocks: range, held: Held) -> StageDraft:
        """What a stage has before it is decided what its blocks leave behind; made once for all alike."""
        budget = stages[stage]
        streamed = None if self.request.streamed is None else self.request.streamed[stage]
        key = (budget.device, blocks, held, streamed)
        if key not in self._drafts:
            shared = sum(other.device == budget.device for other in stages)
            self._drafts[key] = self._new_draft(budget, blocks, shared, held, streamed)
        return self._drafts[key]

    def _new_draft(
        self, budget: Budget, blocks: range, shared: int, held: Held, streamed: int | None
    ) -> StageDraft:
        """`shared` stages are on the same device."""
        own = [self._blocks[i] for i in blocks]
        around = [u for u in self._units if not u.is_block and max(0, u.blocks_before - 1) in blocks]
        # Weights, gradients and what the optimizer keeps
        copies = 2 + self.request.moments
        return StageDraft(
            budget=budget,
            blocks=blocks,
            traces=[self.trace.blocks[_list_of(unit)] for unit in own],
            sizes=[unit.frozen for unit in own],
            weights=sum(unit.frozen for unit in (*own, *around)),
            lora=int(copies * sum(unit.trained for unit in (*own, *around))),
            inputs=self.trace.inputs,
            head=self.trace.head if blocks[-1] == self._num_blocks - 1 else 0,
            dequantized=max(unit.largest for unit in own) if self._dequantizes(budget) else 0,
            spare=int(SPARE * budget.total / shared),
            free=int(budget.free / shared),
            context=None if budget.context is None else int(budget.context / shared),
            shared=shared,
            held=held,
            residency=self.request.residency,
            streamed=streamed,
            means=self.means,
        )

    def _dequantizes(self, budget: Budget) -> bool:
        """Whether a weight is dequantized on this device for each use, and the trace does not count it.

        Weights that are only stored so are traced in full precision; from compiled graphs, one weight that is
        dequantized is left out.
        """
        kind = self.request.trace.quantize
        return kind in STORED_ONLY or (self.request.trace.compile and budget.mode(kind) == "weight-only")

    @staticmethod
    def _ways(drafts: Sequence[StageDraft]) -> list[list[StagePlan]]:
        """What all stages' blocks may leave behind, with less and less of the host."""
        plans = [dict(zip(draft.ways, draft.plans, strict=True)) for draft in drafts]
        return [
            [known[fit] for known, fit in zip(plans, fits, strict=True)]
            for fits in leaner_and_leaner([draft.ways for draft in drafts])
        ]

    @cached_property
    def means(self) -> Means:
        """The average clip of the data, relative to the largest."""
        return self._means_of(self.request.buckets)

    def longer_than_average(self, buckets: Mapping[Bucket, float]) -> float:
        """How many times as long as with the data's average clip the blocks compute with that of these."""
        rates, traces = self.request.budgets[0].rates, [self.trace.blocks[_list_of(b)] for b in self._blocks]

        def seconds(means: Means) -> float:
            forward = sum(rates.forward(means.of(trace.forward)) for trace in traces)
            return forward + sum(rates.backward(means.of(trace.backward)) for trace in traces)

        return seconds(self._means_of(buckets)) / seconds(self.means)

    def _means_of(self, buckets: Mapping[Bucket, float]) -> Means:
        traits = self.request.source.traits
        largest, total = block_tokens(self.largest, traits), sum(buckets.values())
        shares = [(block_tokens(b, traits) / largest, w / total) for b, w in buckets.items()]
        return Means(sum(s * w for s, w in shares), sum(s**2 * w for s, w in shares))


def _apart(orders: Sequence[Order], made: Sequence[StagePlan], hidden: int) -> dict[str, int]:
    """By how much less the devices of several stages hold than these would each at its own peak.

    One works at a time, and they do not all hold the most micro-batches then. What a micro-batch brings
    is there once, from the first of them on. A hidden state of each stage is there until it has left.
    """
    found = {}
    for order in orders:
        own = {action.stage for action in order}
        device = made[order[0].stage].device
        # Stages with orders of their own work side by side.
        if len(own) == 1 or len(own) < sum(stage.device == device for stage in made):
            continue
        workspaces, inputs = (
            {stage: made[stage].parts[part] for stage in own} for part in ("workspace", "inputs")
        )
        found[device] = (
            sum(workspaces.values())
            + sum(inputs.values())
            - inputs[min(own)]
            - len(own) * hidden
            + min(
                sum((made[stage].in_flight - held[stage]) * made[stage].of_each for stage in own)
                - workspaces[working]
                for held, working in at_work(order)
            )
        )
    return found


def _list_of(block: UnitBytes) -> str:
    return block.name.rpartition(".")[0]


def _ranked(begun: tuple[Sequence[Budget], Plan]) -> tuple[Any, ...]:
    return rank(begun[1])
