"""Finds the split that is fastest of those that fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tworeel.data.buckets import tokens
from tworeel.data.clips import Bucket
from tworeel.engine.fitting import SPARE, Fit, Footprint, fit_stages
from tworeel.engine.placement import Placement, place
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Order, make_orders, most_in_flight
from tworeel.models.family import Family, ModelSource
from tworeel.planning.budgets import Budget
from tworeel.planning.drafts import Means, StageDraft
from tworeel.planning.plan import Alternative, Plan, StagePlan
from tworeel.planning.timing import HOST_SECONDS, simulate
from tworeel.planning.tracing import BlockTrace, ModelTrace, TraceSettings, trace_model
from tworeel.planning.weights import UnitBytes, unit_bytes

MOST_ORDERS = 24
"""Of unlike cards: more are not tried."""
AUTO = "auto"
_TRAINING_COPIES = 4
"""Of the LoRA: weight, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    family: Family
    source: ModelSource
    buckets: Mapping[Bucket, float]
    """How often a clip of each bucket is drawn."""
    trace: TraceSettings
    budgets: tuple[Budget, ...]
    """Of the devices, in the order of the stages, once over."""
    may_reorder: bool
    """Whether the devices may take the stages in another order."""
    micro_batches: int
    slack: int
    stages_per_device: int
    split_at: tuple[int, ...] | None
    residency: str
    streamed: tuple[int, ...] | None
    host_free: int
    """Bytes of host memory that may be pinned."""
    steps: int
    clips_per_epoch: float


def plan(request: Request, *, explain: bool = False) -> Plan:
    """Decide which card runs which blocks, and say what that takes.

    Args:
        request: the model, the data, the cards and what is set already.
        explain: weigh alternatives, too.

    Raises:
        ValueError: the request's own settings contradict each other, as `tworeel.engine.place` says.
    """
    planner = Planner(request)
    best = planner.best()
    changes: tuple[Alternative, ...] = () if best.fits else tuple(planner.changes())
    alternatives = tuple(planner.alternatives(best)) if explain else ()
    return replace(best, alternatives=alternatives, changes=changes)


class Planner:
    """Weighs the ways to run one request.

    Args:
        request: what is to be planned.
        trace: what its blocks cost, if that is known.
    """

    def __init__(self, request: Request, trace: ModelTrace | None = None) -> None:
        self.request = request
        self._known_trace = trace
        self._model = request.family.build_transformer(request.source.transformer)
        self._units = unit_bytes(self._model, request.family, request.trace)
        self._largest = max(request.buckets, key=lambda bucket: tokens(bucket, request.source.traits))

    @cached_property
    def trace(self) -> ModelTrace:
        """What the blocks cost for the largest clip."""
        request = self.request
        return self._known_trace or trace_model(request.family, request.source, self._largest, request.trace)

    def best(self) -> Plan:
        """The fastest plan that fits; the one that is nearest to it if none does."""
        return min(self._candidates(), key=_rank)

    def alternatives(self, best: Plan) -> Iterator[Alternative]:
        """Other ways, and why they are not the plan."""
        request = self.request
        others = {
            "even shares of the blocks": {"split_at": self._even(self._num_stages), "may_reorder": False},
            "recompute every block": {"residency": "recompute"},
            "keep all activations": {"residency": "keep"},
            "park activations in host memory": {"residency": "offload-selective"},
            "two stages a device": {"stages_per_device": 2, "split_at": None},
            "no slack": {"slack": 0},
            "twice the micro-batches": {"micro_batches": 2 * request.micro_batches},
        }
        for name, change in others.items():
            try:
                found = Planner(replace(request, **change), self.trace).best()  # type: ignore[arg-type]
            except ValueError:
                continue
            if _decisions(found) != _decisions(best):
                yield _alternative(name, found, best)
        yield from self._other_precisions(best)

    def changes(self) -> Iterator[Alternative]:
        """The smallest changes with which it would fit."""
        request = self.request
        if shorter := self._most_frames():
            yield shorter
        for kind in ("fp8", "nf4"):
            if request.trace.quantize is None:
                found = Planner(replace(request, trace=replace(request.trace, quantize=kind))).best()
                if found.fits:
                    yield _alternative(f"model.quantize = '{kind}'", found, None)
                    break
        one_more = (*request.budgets, request.budgets[-1].another(len(request.budgets)))
        found = Planner(replace(request, budgets=one_more, split_at=None, streamed=None), self.trace).best()
        if found.fits:
            yield _alternative(f"one more {request.budgets[-1].card}", found, None)

    def _other_precisions(self, best: Plan) -> Iterator[Alternative]:
        """What 8-bit weights would change; below what is asked for, so never chosen."""
        if self.request.trace.quantize is None:
            trace = replace(self.request.trace, quantize="fp8")
            yield _alternative(
                "8-bit weights (fp8)", Planner(replace(self.request, trace=trace)).best(), best
            )

    def _most_frames(self) -> Alternative | None:
        """The longest clip of the same size that fits."""
        request, stride = self.request, self.request.source.traits.temporal_stride
        for frames in range(self._largest.frames - stride, 0, -stride):
            bucket = replace(self._largest, frames=frames)
            share = tokens(bucket, request.source.traits) / tokens(self._largest, request.source.traits)
            smaller = Planner(replace(request, buckets={bucket: 1.0}), _scaled(self.trace, share)).best()
            if smaller.fits:
                return _alternative(f"clips of at most {frames} frames", smaller, None)
        return None

    def _candidates(self) -> Iterator[Plan]:
        request = self.request
        for budgets in self._orders():
            stages = budgets * request.stages_per_device
            if request.split_at is not None:
                yield self._evaluate(stages, request.split_at)
            else:
                yield from self._splits(stages)

    def _orders(self) -> Iterator[tuple[Budget, ...]]:
        """The devices in each order that differs."""
        budgets = self.request.budgets
        if not self.request.may_reorder:
            yield budgets
            return
        seen = set()
        for order in itertools.islice(itertools.permutations(budgets), MOST_ORDERS):
            key = tuple((budget.card, budget.free, budget.total) for budget in order)
            if key not in seen:
                seen.add(key)
                yield order

    def _splits(self, stages: Sequence[Budget]) -> Iterator[Plan]:
        """All boundaries of two stages; of more, from even shares on to whatever neighbour is better."""
        count = self._num_blocks
        if len(stages) == 1:
            yield self._evaluate(stages, ())
        elif len(stages) == 2:
            yield from (self._evaluate(stages, (at,)) for at in range(1, count))
        else:
            yield self._descend(stages)

    def _descend(self, stages: Sequence[Budget]) -> Plan:
        best = self._evaluate(stages, self._even(len(stages)))
        while True:
            near = [self._evaluate(stages, at) for at in _neighbours(best.split_at, self._num_blocks)]
            better = min(near, key=_rank, default=best)
            if _rank(better) >= _rank(best):
                return best
            best = better

    @cached_property
    def _blocks(self) -> list[UnitBytes]:
        return [unit for unit in self._units if unit.is_block]

    @property
    def _num_stages(self) -> int:
        return len(self.request.budgets) * self.request.stages_per_device

    @property
    def _num_blocks(self) -> int:
        return len(self._blocks)

    def _even(self, num_stages: int) -> tuple[int, ...]:
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
        if len(at) != len(stages) - 1 or any(a >= b for a, b in itertools.pairwise(boundaries)):
            self._place(len(stages), at)  # says what is wrong with it
        depths = most_in_flight(self._orders_of(stages), len(stages))
        return [self._draft(i, stages, boundaries, depth) for i, depth in enumerate(depths)]

    def assembled(
        self, stages: Sequence[Budget], drafts: Sequence[StageDraft], made: Sequence[StagePlan]
    ) -> Plan:
        """The plan of these stages, with the time of a step."""
        request = self.request
        hidden = max(trace.footprints[Residency.KEEP].hidden for trace in self.trace.blocks.values())
        crossing = hidden / min(budget.rates.crossing for budget in stages) if len(stages) > 1 else 0.0
        orders = self._orders_of(stages)
        time = simulate(orders, [s.forward for s in made], [s.backward for s in made], crossing)
        host = request.micro_batches * self._num_blocks * HOST_SECONDS[request.trace.compile]
        step = time.at_least(host)
        pairs = zip(drafts, made, strict=True)
        return Plan(
            model=request.source.traits.variant,
            precision=request.trace.quantize or str(request.trace.dtype).removeprefix("torch."),
            compiled=request.trace.compile,
            micro_batches=request.micro_batches,
            tokens=tokens(self._largest, request.source.traits),
            stages=tuple(made),
            host_memory=sum(draft.parked(stage) + stage.streamed * draft.block for draft, stage in pairs),
            host_free=request.host_free,
            seconds_per_step=step.seconds,
            busy=step.busy,
            host_bound=host > time.seconds,
            steps=request.steps,
            steps_per_epoch=request.clips_per_epoch / request.micro_batches,
            calibrated=all(budget.measured for budget in stages),
        )

    def _evaluate(self, stages: Sequence[Budget], at: Sequence[int]) -> Plan:
        drafts = self.drafts(stages, at)
        return self.assembled(stages, drafts, self._decide(drafts))

    def _orders_of(self, stages: Sequence[Budget]) -> list[Order]:
        request = self.request
        return make_orders([b.device for b in stages], request.micro_batches, slack=request.slack)

    def _draft(
        self, stage: int, stages: Sequence[Budget], boundaries: Sequence[int], in_flight: int
    ) -> StageDraft:
        """What a stage has before it is decided what its blocks leave behind."""
        budget, blocks = stages[stage], range(boundaries[stage], boundaries[stage + 1])
        own = [self._blocks[i] for i in blocks]
        around = [u for u in self._units if not u.is_block and max(0, u.blocks_before - 1) in blocks]
        shared = sum(other.device == budget.device for other in stages)
        return StageDraft(
            budget=budget,
            blocks=blocks,
            traces=[self.trace.blocks[unit.name.rpartition(".")[0]] for unit in own],
            block=max(unit.frozen for unit in own),
            weights=sum(unit.frozen for unit in (*own, *around)),
            lora=_TRAINING_COPIES * sum(unit.trained for unit in (*own, *around)),
            inputs=self.trace.inputs * in_flight,
            spare=int(SPARE * budget.total / shared),
            free=int(budget.free / shared),
            in_flight=in_flight,
        )

    def _decide(self, drafts: Sequence[StageDraft]) -> list[StagePlan]:
        """What all stages' blocks leave behind; as the engine decides it when it has measured."""
        residency, given = self.request.residency, self.request.streamed
        counts = given or (0,) * len(drafts)
        memories = [draft.memory(count) for draft, count in zip(drafts, counts, strict=True)]
        if residency == AUTO:
            found = fit_stages(memories, [draft.footprints for draft in drafts], self.request.host_free)
            fits = [fit for fit in found if fit is not None]
            if given is None:
                counts = tuple(d.to_stream(fit.missing) for d, fit in zip(drafts, fits, strict=True))
        elif residency == Residency.KEEP:
            fits = [Fit(memory.may_keep, Residency.SELECTIVE) for memory in memories]
        else:
            fits = [Fit(0, Residency(residency)) for _ in memories]
        decided = zip(drafts, fits, counts, strict=True)
        return [draft.decide(fit, count, self.means) for draft, fit, count in decided]

    @cached_property
    def means(self) -> Means:
        """The average clip of the data, relative to the largest."""
        traits = self.request.source.traits
        largest, total = tokens(self._largest, traits), sum(self.request.buckets.values())
        shares = [(tokens(b, traits) / largest, w / total) for b, w in self.request.buckets.items()]
        return Means(sum(s * w for s, w in shares), sum(s**2 * w for s, w in shares))


def _rank(plan: Plan) -> tuple[Any, ...]:
    """Less is better: what fits, by its time; then what is nearest to fitting."""
    if plan.fits:
        return 0, plan.seconds_per_step
    missing = sum(max(0, stage.peak + stage.spare - stage.free) for stage in plan.stages)
    return 1, missing + max(0, plan.host_memory - plan.host_free)


def _neighbours(at: tuple[int, ...], num_blocks: int) -> Iterator[tuple[int, ...]]:
    """The boundaries with one or two of them moved by a block."""
    for moves in itertools.product((-1, 0, 1), repeat=len(at)):
        moved = tuple(a + move for a, move in zip(at, moves, strict=True))
        if any(moves) and all(a < b for a, b in itertools.pairwise((0, *moved, num_blocks))):
            yield moved


def _decisions(plan: Plan) -> tuple[Any, ...]:
    stages = [(s.device, s.first, s.kept, s.residency, s.streamed) for s in plan.stages]
    return tuple(stages), plan.micro_batches, plan.precision


def _alternative(name: str, found: Plan, best: Plan | None) -> Alternative:
    if not found.fits:
        reason = f"does not fit: {found.limit}"
    elif best is None:
        reason = "fits"
    else:
        per_clip = found.seconds_per_step / found.micro_batches
        share = per_clip / (best.seconds_per_step / best.micro_batches)
        reason = f"{share:.2f} times the time of a clip"
    return Alternative(
        name=name,
        fits=found.fits,
        seconds_per_step=found.seconds_per_step,
        peaks=tuple(stage.peak for stage in found.stages),
        reason=reason,
    )


def _scaled(trace: ModelTrace, share: float) -> ModelTrace:
    """The trace of a clip of `share` times the tokens: all but attention's work grows with them."""
    means = Means(share, share**2)

    def footprint(found: Footprint) -> Footprint:
        return Footprint(int(found.kept * share), int(found.working * share), int(found.hidden * share))

    return ModelTrace(
        blocks={
            name: BlockTrace(
                footprints={key: footprint(value) for key, value in block.footprints.items()},
                forward=means.of(block.forward),
                backward=means.of(block.backward),
                recomputed={key: means.of(work) for key, work in block.recomputed.items()},
            )
            for name, block in trace.blocks.items()
        },
        inputs=trace.inputs,
    )
