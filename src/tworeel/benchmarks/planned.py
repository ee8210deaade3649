"""Plans a case as a run is planned: boundaries, and weights that wait in host memory from the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.preparing import Observer, Settings
from tworeel.benchmarks.results import Planned
from tworeel.benchmarks.shapes import Case
from tworeel.data.clips import Bucket
from tworeel.host_memory import HOST_SHARE, available_memory
from tworeel.lora.targets import find_targets
from tworeel.models.family import ModelSource
from tworeel.models.registry import FAMILIES
from tworeel.planning.budgets import Budget
from tworeel.planning.devices import budgets_of_devices
from tworeel.planning.measurements import calibrated
from tworeel.planning.measuring import Stopwatch
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Plan
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings


class Planners:
    """Makes planners; what is found out of a model serves all that follow."""

    def __init__(self) -> None:
        self._known: list[Planner] = []

    def planner(self, request: Request) -> Planner:
        """A planner of the request, which knows what the last one for the same model has traced."""
        like = next((one for one in self._known if one.request.source == request.source), None)
        found = Planner(request, like=like)
        self._known = [*(one for one in self._known if one is not like), found]
        return found


class Plans:
    """Plans one case after the other on the devices of this machine.

    Args:
        observer: told where there is no plan, or where it does not fit.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._planners = Planners()
        self._stopwatch = Stopwatch()

    def follow(self, case: Case, settings: Settings, blocks: int) -> tuple[Settings, Planned | None]:
        """Decide what the settings leave open; on CPUs there is nothing to choose.

        Devices are to hold nothing of an earlier case, and may be limited when this returns.

        Returns:
            The settings with the plan's boundaries, and what it says; as they are, and None, without one.
        """
        if any(device.type == "cpu" for device in settings.devices):
            return settings, None
        machine.limit_memory(settings.devices, settings.cap_gib)
        try:
            budgets = budgets_of_devices(settings.devices)
            request = request_of_case(case, settings, blocks, budgets)
            return self.follow_on(self._as_fast(request), settings)
        except Exception as error:  # noqa: BLE001  # torch's tracing may raise anything; no plan is needed
            shares = "even shares of the blocks" if settings.split_at is None else "the boundaries are kept"
            self._observer.say(f"  no plan could be made ({type(error).__name__}: {error}); {shares}")
        return settings, None

    def _as_fast(self, request: Request) -> Request:
        """With what runs have measured on these cards; where none was, with a short measurement."""
        budgets = [calibrated(budget, request.trace) for budget in request.budgets]
        return replace(request, budgets=tuple(map(self._stopwatch.timed, budgets)))

    def follow_on(self, request: Request, settings: Settings) -> tuple[Settings, Planned]:
        """Decide what the settings leave open, on the devices of the request."""
        planner = self._planners.planner(request)
        plan = planner.best()
        if not plan.fits:
            self._observer.say(f"  the plan does not fit, and is tried all the same: {plan.limit}")
        return followed(settings, plan), figures_of(planner, plan)


def request_of_case(case: Case, settings: Settings, blocks: int, budgets: Sequence[Budget]) -> Request:
    """What is to be planned for a case.

    Args:
        case: with its model and micro-batches.
        settings: how it is run.
        blocks: of the model.
        budgets: of the devices, in the order of the stages, once over.
    """
    return make_request(
        models.source_of(case.model, blocks),
        bucket_of(case),
        settings,
        budgets,
        micro_batches=case.micro_batches,
        dtype=models.dtype_of(case.model),
        condition_on_image=False,  # a case has no image
    )


def make_request(
    source: ModelSource,
    bucket: Bucket,
    settings: Settings,
    budgets: Sequence[Budget],
    *,
    micro_batches: int,
    dtype: torch.dtype = torch.bfloat16,
    condition_on_image: bool = True,
) -> Request:
    """What is to be planned for steps of clips of one size, with a LoRA on all linear layers of the blocks.

    Args:
        source: of the model; nothing but its configuration is used.
        bucket: frames, height and width of the clips in pixels.
        settings: how they are run.
        budgets: of the devices, in the order of the stages, once over.
        micro_batches: clips of a step.
        dtype: of weights that are not quantized.
        condition_on_image: whether a model whose image is optional is given one.
    """
    family = FAMILIES[source.traits.family]
    model = family.build_transformer(source.transformer)
    targets = find_targets(model, family.lora_presets["all-linear"], family.block_lists)
    trace = TraceSettings(
        dtype=dtype,
        quantize=settings.quantize,
        compile=settings.compile,
        exact=settings.exact,
        rank=settings.rank,
        targets=tuple(targets),
        condition_on_image=condition_on_image,
    )
    return Request(
        family=family,
        source=source,
        buckets={bucket: 1.0},
        trace=trace,
        budgets=tuple(budgets),
        may_reorder=settings.may_reorder,
        micro_batches=micro_batches,
        slack=settings.slack,
        stages_per_device=settings.stages_per_device,
        split_at=settings.split_at,
        residency=settings.residency,
        streamed=settings.streamed,
        host_free=int(HOST_SHARE * available_memory()),
        steps=settings.rounds,
        clips_per_epoch=micro_batches,
        cpp_wrapper=settings.cpp_wrapper,
    )


def bucket_of(case: Case) -> Bucket:
    """The case's clips in frames and pixels: exactly those that become its tokens."""
    frames, height, width = case.grid
    model = case.model
    return Bucket(
        frames=model.temporal_stride * (frames - 1) + 1,
        height=model.multiple * height,
        width=model.multiple * width,
    )


def followed(settings: Settings, plan: Plan) -> Settings:
    """The settings with what the plan decides; what they say already is the plan's, too."""
    counts = tuple(stage.streamed for stage in plan.stages)
    # Without the host memory for them, what is streamed is for the engine to find out.
    streams = settings.streamed is None and any(counts) and plan.host_memory <= plan.host_free
    return replace(
        settings,
        devices=tuple(map(torch.device, plan.devices[: len(settings.devices)])),
        split_at=plan.split_at or None,
        streamed=counts if streams else settings.streamed,
        may_stream=True if streams else settings.may_stream,
    )


def figures_of(planner: Planner, plan: Plan) -> Planned:
    """What the plan says, to be held against what is measured."""
    peaks = plan.peaks
    for device, size in zip(plan.devices, _of_optimizer(planner, plan), strict=True):
        peaks[device] -= size
    return Planned(
        fits=plan.fits,
        limit=plan.limit,
        devices=tuple(plan.devices),
        split_at=plan.split_at,
        streamed=tuple(stage.streamed for stage in plan.stages),
        seconds_per_clip=plan.seconds_per_step / plan.micro_batches,
        peaks=peaks,
        host_memory=plan.host_memory,
        calibrated=plan.calibrated,
    )


def _of_optimizer(planner: Planner, plan: Plan) -> list[int]:
    """Bytes of each stage that a run's optimizer would keep: room is left for them, and no step takes it."""
    budgets = {budget.device: budget for budget in planner.request.budgets}
    stages = [budgets[device] for device in plan.devices]
    without = Planner(replace(planner.request, moments=0.0), planner.trace, planner)
    drafts = (one.drafts(stages, plan.split_at) for one in (planner, without))
    return [ours.lora - theirs.lora for ours, theirs in zip(*drafts, strict=True)]
