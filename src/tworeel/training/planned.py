"""A run's plan: made before anything is loaded, followed, and held against what is measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from tworeel.config.schema import RunConfig
from tworeel.data.clips import Bucket
from tworeel.engine import Split
from tworeel.engine.compiling import TRIED_FROM_CPP, may_launch_from_cpp
from tworeel.engine.fitting import SPARE
from tworeel.engine.footprints import Footprints
from tworeel.errors import raise_if_any
from tworeel.host_memory import HOST_SHARE, available_memory
from tworeel.planning.budgets import Budget, budget_of_card
from tworeel.planning.cards import Card
from tworeel.planning.changing import changes
from tworeel.planning.choosing import choose
from tworeel.planning.devices import budgets_of_devices
from tworeel.planning.explaining import explained
from tworeel.planning.measured_bytes import keep_bytes, known_bytes
from tworeel.planning.measurements import calibrated, keep, keep_launching
from tworeel.planning.measuring import Stopwatch
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Plan
from tworeel.planning.precisions import eight_bit_kind
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings
from tworeel.report.plan import in_words
from tworeel.training.choices import settled, stages_per_device
from tworeel.training.loadable import place_again, place_blocks, torch_dtype
from tworeel.training.preflight import Job
from tworeel.training.report import StepReport
from tworeel.units import GIB, gibibytes

UNMEASURED = 2
"""Steps that tell nothing of a run's speed: they compile and measure."""
MEASURED = 3
"""The steps after them, which do."""


def trace_settings(config: RunConfig, job: Job) -> TraceSettings:
    """How the run's blocks are run on GPUs."""
    return TraceSettings(
        dtype=torch_dtype(config.model.dtype),
        quantize=settled(config).model.quantize,
        compile=config.engine.compile is not False,
        exact=config.engine.exact,
        rank=config.lora.rank,
        dora=config.lora.dora,
        targets=job.targets,
        condition_on_image=config.train.condition_on_image,
    )


def make_request(
    config: RunConfig,
    job: Job,
    budgets: Sequence[Budget],
    *,
    host_memory: int | None = None,
    may_reorder: bool | None = None,
    may_launch_from_cpp: bool = True,
) -> Request:
    """What is to be planned for a run.

    Args:
        config: of the run.
        job: what it works on.
        budgets: of the devices, in the order of the stages, once over.
        host_memory: bytes of the machine's memory; what is available here by default.
        may_reorder: whether the devices may change places; where the configuration does not name them by
            default.
        may_launch_from_cpp: whether the machine could.
    """
    weights = [source.weight * source.repeats for source in config.data.sources]
    buckets: dict[Bucket, float] = defaultdict(float)
    for clip in job.clips:
        buckets[clip.bucket] += weights[clip.source]
    host = available_memory() if host_memory is None else host_memory
    settings = trace_settings(config, job)
    engine = config.engine
    request = Request(
        family=job.family,
        source=job.source,
        buckets=buckets,
        trace=settings,
        budgets=tuple(budgets),
        may_reorder=engine.devices is None if may_reorder is None else may_reorder,
        micro_batches=config.train.micro_batches,
        slack=engine.slack,
        stages_per_device=stages_per_device(config),
        split_at=engine.split_at,
        residency=engine.residency,
        streamed=engine.streamed_blocks,
        host_free=int(HOST_SHARE * host),
        steps=config.train.steps,
        clips_per_epoch=sum(config.data.sources[clip.source].repeats for clip in job.clips),
        # 8-bit moments have a scale for each 256 numbers
        moments=2 * (1 + 4 / 256) / 4 if config.train.optimizer == "adamw8bit" else 2.0,
        may_interleave=engine.stages_per_device == "auto",
        cpp_wrapper=engine.cpp_wrapper is True and settings.compile,
        may_launch_from_cpp=may_launch_from_cpp and engine.cpp_wrapper == "auto" and _launches(settings),
        attention=engine.attention,
    )
    if config.model.quantize != "auto":
        return _as_measured(request)
    settings = replace(settings, quantize=eight_bit_kind(budgets))
    launches = request.may_launch_from_cpp and _launches(settings)
    eight_bit = replace(request, trace=settings, may_launch_from_cpp=launches)
    return replace(_as_measured(request), less_precise=(_as_measured(eight_bit),))


def _launches(settings: TraceSettings) -> bool:
    """Whether there is something to launch that is known to run so."""
    return settings.compile and settings.quantize in TRIED_FROM_CPP


def _as_measured(request: Request) -> Request:
    """With what runs like it have measured on its cards."""
    budgets = tuple(calibrated(b, request.trace) for b in request.budgets)
    return replace(request, budgets=budgets, measured=known_bytes(request))


def budgets_of_cards(cards: Sequence[Card]) -> tuple[Budget, ...]:
    """Cards that need not be here, nothing else running on them.

    Raises:
        UserError: lists every card that is smaller than what CUDA takes for itself.
    """
    budgets = tuple(budget_of_card(card, number) for number, card in enumerate(cards))
    raise_if_any(
        dict.fromkeys(
            f"{card.name} with {gibibytes(card.memory)}: CUDA itself takes {gibibytes(budget.context or 0)}"
            for card, budget in zip(cards, budgets, strict=True)
            if budget.free <= 0
        )
    )
    return budgets


@dataclass
class PlannedRun:
    """A plan that is followed, and what the first steps say of it."""

    plan: Plan
    planner: Planner
    """That has made it."""
    _reports: list[StepReport] = field(default_factory=list)
    _footprints: Sequence[Mapping[str, Footprints]] = ()
    """That were kept last."""

    def heard(self, report: StepReport) -> str | None:
        """Take a step's report; once enough were heard, what was measured beside what was planned."""
        if len(self._reports) == UNMEASURED + MEASURED:
            return None
        self._reports.append(report)
        if len(self._reports) < UNMEASURED + MEASURED:
            return None
        return self._compared(self._reports[UNMEASURED:])

    def _compared(self, reports: Sequence[StepReport]) -> str:
        found = self.plan
        # What the host limits does not depend on the clips.
        longer = 1.0 if found.host_bound else self._longer(reports)
        for card, slowdown in self._slowdowns(reports, longer).items():
            keep(card, self.planner.request.trace, slowdown)
        for card, launching in self._launching(reports).items():
            keep_launching(card, self.planner.request.trace, launching)
        seconds = fmean(report.seconds for report in reports) / found.micro_batches
        held = reports[-1].memory
        memory = ", ".join(
            f"{device} {held[device] / GIB:.1f} GiB (planned {peak / GIB:.1f})"
            for device, peak in found.peaks.items()
            if device in held
        )
        planned = longer * found.seconds_per_step / found.micro_batches
        return f"A clip takes {seconds:.2f} s (planned {planned:.2f}); peaks: {memory}"

    def keep_bytes(self, split: Split) -> None:
        """Keep what the split's blocks were found to take; again when a larger clip was measured."""
        if split.footprints == self._footprints:
            return
        self._footprints = split.footprints
        if split.compiler is not None and split.compiler.failed:
            return  # some ran as they are
        budgets = {budget.device: budget for budget in self.planner.request.budgets}
        stages = [budgets[stage.device] for stage in self.plan.stages]
        keep_bytes(self.planner.request, list(zip(stages, split.footprints, strict=True)))

    def _slowdowns(self, reports: Sequence[StepReport], longer: float) -> dict[str, float]:
        """How much longer than by its figures each card worked, over all of its stages that only compute.

        Waiting for the host says nothing of a card, nor do copies to host memory and back.

        Args:
            reports: of the steps.
            longer: how many times as long as the data's average clip theirs take.
        """
        budgets = {budget.device: budget for budget in self.planner.request.budgets}
        worked: dict[str, float] = defaultdict(float)
        by_figures: dict[str, float] = defaultdict(float)
        for number, stage in enumerate(() if self.plan.host_bound else self.plan.stages):
            if stage.only_computes:
                step = fmean(report.busy[number] * report.seconds for report in reports)
                worked[stage.card] += step / self.plan.micro_batches
                planned = longer * (stage.forward + stage.backward)
                by_figures[stage.card] += planned / budgets[stage.device].slowdown
        return {card: seconds / by_figures[card] for card, seconds in worked.items()}

    def _longer(self, reports: Sequence[StepReport]) -> float:
        """How many times as long as the data's average clip those of these steps take, which chance drew."""
        return self.planner.longer_than_average(Counter(b for report in reports for b in report.buckets))

    def _launching(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """How much longer than by the figures the host took to launch, if that is what the run waits for."""
        if not self.plan.host_bound:
            return {}
        longer = fmean(report.seconds for report in reports) / self.plan.seconds_per_step
        known = max(budget.launching or 1.0 for budget in self.planner.request.budgets)
        return {stage.card: longer * known for stage in self.plan.stages}

    def would_fit(self, room: Mapping[str, int]) -> tuple[str, ...] | None:
        """What would fit where a run has so much memory now, in words; None if the plan still does.

        Args:
            room: bytes by device that this process may have, with what it holds already.
        """
        request = self.planner.request
        budgets = tuple(replace(budget, free=room[budget.device]) for budget in request.budgets)
        if all(
            now.free >= (1 - SPARE) * then.free for now, then in zip(budgets, request.budgets, strict=True)
        ):
            return None
        now = Planner(replace(request, budgets=budgets), self.planner.trace, self.planner)
        if now.best().fits:
            return ("the same run with a new plan, which --resume makes",)
        return tuple(map(in_words, changes(now)))


def plan_job(
    config: RunConfig, job: Job, say: Callable[[str], None], cards: Sequence[Card] | None = None
) -> tuple[RunConfig, Job, PlannedRun | None]:
    """Plan a run on the devices that it has, and place its blocks as the plan says.

    Args:
        config: of the run.
        job: what it works on.
        say: told if no plan could be made.
        cards: that are known; those of the table by default.

    Returns:
        The configuration with nothing left open; the job; and what was planned, None where a stage is on a
        CPU: there is nothing to choose.

    Raises:
        UserError: no plan could be made, and the options do not fit even shares of the blocks.
    """
    job = replace(job, cpp_wrapper=config.engine.cpp_wrapper is True)
    stages = job.placement.devices
    devices = stages[: len(stages) // stages_per_device(config)]
    if any(device.type == "cpu" for device in devices):
        return settled(config), job, None
    try:
        budgets = budgets_of_devices(devices, cards)
        request = make_request(config, job, budgets, may_launch_from_cpp=may_launch_from_cpp())
        return _followed(config, job, _timed(request))
    except Exception as error:  # noqa: BLE001  # torch's tracing may raise anything, and a run needs no plan
        say(f"no plan could be made ({type(error).__name__}: {error}); {_unplanned(config)}")
    placement, streamed = place_blocks(job.transformer, config, job.family, devices, planned=False)
    return settled(config), replace(job, placement=placement, streamed=streamed), None


def _unplanned(config: RunConfig) -> str:
    """What becomes of a run without a plan."""
    done = ["the blocks are shared evenly"]
    if config.model.quantize == "auto":
        done.append(f"model.quantize = 'auto' is {config.model.dtype}")
    if config.engine.stages_per_device == "auto":
        done.append("engine.stages_per_device = 'auto' is 1")
    return ", ".join(done)


def plan_on(config: RunConfig, job: Job, budgets: Sequence[Budget]) -> tuple[RunConfig, Job, PlannedRun]:
    """Plan a run on these devices, and place its blocks as the plan says."""
    return _followed(config, job, make_request(config, job, budgets))


def _timed(request: Request) -> Request:
    """With the speed that a second's measurement tells, where no run on a card was measured yet."""
    stopwatch = Stopwatch()

    def known(one: Request) -> Request:
        return replace(one, budgets=tuple(map(stopwatch.timed, one.budgets)))

    return replace(known(request), less_precise=tuple(map(known, request.less_precise)))


def _followed(config: RunConfig, job: Job, request: Request) -> tuple[RunConfig, Job, PlannedRun]:
    choice = choose(request)
    found, decided = explained(choice), choice.planner.request
    devices = [torch.device(stage.device) for stage in found.stages]
    quantize, stages = decided.trace.quantize, decided.stages_per_device
    placed = place_again(job, devices, found.split_at, [stage.streamed for stage in found.stages])
    placed = replace(placed, cpp_wrapper=decided.cpp_wrapper)
    return settled(config, quantize, stages), placed, PlannedRun(found, choice.planner)
