"""The plan beside what is measured: peaks and time of some training steps with an optimizer.

    python bench/planning.py                        all cases, on all GPUs
    python bench/planning.py --cases t2v            those whose name has this in it
    python bench/planning.py --phase edges          the longest clip that a plan accepts under a limit, and
                                                    the next longer one, forced
    python bench/planning.py --phase splits         unequal limits: every second boundary against the planned
    python bench/planning.py --tiny                 seconds, on the CPU: no peaks, to see that it works

Transformers of real size with random weights, a LoRA on all linear layers of the blocks. Figures are told and
written as soon as each case is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import psutil
import torch
from measuring import console, gib

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.shapes import model_shape
from tworeel.benchmarks.widths import FLUX2_DEV, TINY_FLUX2
from tworeel.benchmarks.widths import TINY as TINY_SHAPE
from tworeel.data.clips import Bucket
from tworeel.engine import Pipeline, place, split
from tworeel.engine.attention import attention_backend
from tworeel.engine.releasing import release_memory
from tworeel.lora.state import lora_parameters
from tworeel.lora.targets import find_targets
from tworeel.models.family import Component, Family, ModelSource, Traits
from tworeel.models.flux2 import variants
from tworeel.models.registry import FAMILIES
from tworeel.planning.budgets import Budget
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.measuring import measured
from tworeel.planning.planner import Planner, Request
from tworeel.planning.plans import Plan
from tworeel.planning.tracing import TraceSettings
from tworeel.training.assembly import HOST_SHARE
from tworeel.training.planned import budgets_of_cards, budgets_of_devices

STEPS = 2
"""The first one compiles and decides what blocks leave behind; the last one is timed."""
EDGE_STEPS = 3
WITHIN = 0.05
"""Of a measured peak, or half a GiB: what a plan may be off."""

WAN_14B = models.config_of(model_shape("wan-14b"))
CONFIGS: dict[str, dict[str, Any]] = {
    "t2v-a14b": WAN_14B,
    "i2v-14b": {**WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "ti2v-5b": models.config_of(model_shape("wan-5b")),
    "tiny": models.config_of(TINY_SHAPE),
    "flux2-dev": models.config_of(FLUX2_DEV),
    "tiny-flux2": models.config_of(TINY_FLUX2),
}
SIZES = {
    "480p": (480, 832),
    "720p": (704, 1280),
    "512x512": (512, 512),
    "1024x1024": (1024, 1024),
    "tiny": (64, 64),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration that is planned and run."""

    model: str
    size: str
    frames: int
    quantize: str | None = None
    stages: int = 2
    residency: str = "auto"
    caps: tuple[float, ...] = ()
    """GiB that each device may use; all by default, one number for all of them."""
    compile: bool = True
    micro_batches: int = 3
    at: tuple[int, ...] | None = None
    rank: int = 32

    @property
    def name(self) -> str:
        """In one line."""
        words = [
            self.model,
            self.size,
            f"{self.frames} frames",
            self.quantize or "bf16",
            f"{self.stages} stages",
        ]
        words += [self.residency] if self.residency != "auto" else []
        words += ["+".join(f"{cap:g} GiB" for cap in self.caps)] if self.caps else []
        words += [] if self.compile else ["eager"]
        words += [f"split at {','.join(map(str, self.at))}"] if self.at else []
        return " ".join(words)

    @property
    def bucket(self) -> Bucket:
        """Of its clips."""
        height, width = SIZES[self.size]
        return Bucket(frames=self.frames, height=height, width=width)


CASES = (
    # Those of one shape and precision in a row: they share what was compiled.
    Case(model="t2v-a14b", size="480p", frames=49),
    Case(model="t2v-a14b", size="480p", frames=49, caps=(22.5,)),
    Case(model="t2v-a14b", size="480p", frames=49, residency="recompute"),
    Case(model="t2v-a14b", size="480p", frames=49, residency="selective"),
    Case(model="t2v-a14b", size="480p", frames=49, residency="offload-selective"),
    Case(model="t2v-a14b", size="480p", frames=49, quantize="fp8"),
    Case(model="t2v-a14b", size="480p", frames=49, quantize="fp8", caps=(16,)),
    Case(model="t2v-a14b", size="480p", frames=49, quantize="int8", compile=False),
    Case(model="t2v-a14b", size="480p", frames=49, residency="recompute", compile=False),
    Case(model="t2v-a14b", size="480p", frames=17, compile=False),
    Case(model="t2v-a14b", size="480p", frames=1),
    Case(model="t2v-a14b", size="720p", frames=17, compile=False),
    Case(model="t2v-a14b", size="480p", frames=81, residency="recompute", compile=False, micro_batches=2),
    Case(model="i2v-14b", size="480p", frames=49, compile=False, micro_batches=2),
    Case(model="i2v-14b", size="480p", frames=17, caps=(22.5,), compile=False),
    Case(model="ti2v-5b", size="720p", frames=49, compile=False),
    Case(model="ti2v-5b", size="720p", frames=81, stages=1, compile=False),
    Case(model="ti2v-5b", size="720p", frames=17, stages=1, caps=(22.5,)),
    Case(model="t2v-a14b", size="480p", frames=81, caps=(22.5,), compile=False, micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=49, caps=(15,), compile=False, micro_batches=2),
    Case(
        model="t2v-a14b",
        size="720p",
        frames=81,
        quantize="fp8",
        caps=(30,),
        compile=False,
        micro_batches=2,
    ),
    Case(model="t2v-a14b", size="480p", frames=49, stages=4),
    Case(model="flux2-dev", size="512x512", frames=1, rank=16, quantize="fp8", caps=(22.5,)),
    Case(model="flux2-dev", size="512x512", frames=1, rank=16, quantize="fp8"),
    Case(model="flux2-dev", size="1024x1024", frames=1, rank=16, quantize="fp8", caps=(22.5,)),
    Case(model="flux2-dev", size="1024x1024", frames=1, rank=16, quantize="fp8", caps=(30,)),
    Case(model="flux2-dev", size="1024x1024", frames=1, rank=16),
)
EDGES = (
    Case(model="ti2v-5b", size="720p", frames=81, caps=(12,), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=81, caps=(16,), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=121, caps=(22.5,), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=121, caps=(22.5,), quantize="fp8", micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=121, caps=(30,), micro_batches=2),
    Case(model="i2v-14b", size="480p", frames=81, caps=(22.5,), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=81, caps=(22.5, 15), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=121, caps=(30, 22.5), micro_batches=2),
    Case(model="ti2v-5b", size="720p", frames=81, caps=(15, 11), micro_batches=2),
    Case(model="t2v-a14b", size="480p", frames=81, caps=(15, 11), quantize="fp8", micro_batches=2),
)
SPLITS = (
    Case(model="t2v-a14b", size="480p", frames=17, caps=(22.5, 15)),
    Case(model="t2v-a14b", size="480p", frames=17, caps=(30, 22.5)),
    Case(model="ti2v-5b", size="720p", frames=17, caps=(15, 11)),
)
TINY = (Case(model="tiny", size="tiny", frames=5, micro_batches=2, compile=False),)
TINY_CASES = (*TINY, replace(TINY[0], model="tiny-flux2", frames=1))
_timed: dict[str, Budget] = {}
"""Devices with the speed that a second's measurement gave them, as a run plans with it."""
_compiled_for: list[tuple[Any, ...]] = []
EVERY = 2
"""Which boundaries are tried."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the steps took."""

    seconds: float
    peaks: dict[str, int]


def source_of(case: Case) -> ModelSource:
    """The model as if it had been found on disk."""
    transformer = Component(files=(), layout="native", config=CONFIGS[case.model])
    if "flux2" in case.model:
        return ModelSource(traits=variants.traits("flux2-dev"), transformer=transformer)
    five = case.model == "ti2v-5b"
    traits = Traits(
        family="wan",
        variant=case.model,
        frame_rate=16,
        spatial_multiple=32 if five else 16,
        temporal_stride=4,
        tokens_per_pixel_area=1024 if five else 256,
        image_inputs=("first_image",) if five or case.model == "i2v-14b" else (),
        image_optional=five,
    )
    return ModelSource(traits=traits, transformer=transformer)


def family_of(source: ModelSource) -> Family:
    """The family that a model is of."""
    return FAMILIES[source.traits.family]


def request_of(case: Case, devices: Sequence[torch.device]) -> Request:
    """What is to be planned."""
    source = source_of(case)
    family = family_of(source)
    model = family.build_transformer(source.transformer)
    targets = tuple(find_targets(model, family.lora_presets["all-linear"], family.block_lists))
    return Request(
        family=family,
        source=source,
        buckets={case.bucket: 1.0},
        trace=TraceSettings(targets=targets, quantize=case.quantize, compile=case.compile, rank=case.rank),
        budgets=_budgets(devices),
        may_reorder=False,
        micro_batches=case.micro_batches,
        slack=1,
        stages_per_device=1,
        split_at=case.at,
        residency=case.residency,
        streamed=None,
        host_free=int(HOST_SHARE * psutil.virtual_memory().available),
        steps=1,
        clips_per_epoch=case.micro_batches,
    )


def measure(
    case: Case, request: Request, devices: Sequence[torch.device], at: Sequence[int], steps: int = STEPS
) -> Measured | None:
    """Train some steps; the last one's time, and the peaks."""
    try:
        return _measure(case, request, devices, at, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        release_memory()


def _measure(
    case: Case, request: Request, devices: Sequence[torch.device], at: Sequence[int], steps: int
) -> Measured:
    _forget_compiled(case)
    family = request.family
    model = family.build_transformer(request.source.transformer)
    placement = place(model, devices, at=at, blocks=family.block_lists)
    quantize: Any = case.quantize
    models.fill(model, family, placement, dtype=torch.bfloat16, rank=case.rank, quantize=quantize)
    machine.reset_peaks(devices)
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    division = split(
        model,
        devices,
        at=at,
        blocks=family.block_lists,
        residency=case.residency,
        compile=case.compile,
        host_limit=request.host_free,
    )
    pipeline = Pipeline(division, slack=request.slack)
    batches = list(_batches(case, request))
    seconds = 0.0
    with attention_backend("auto", devices):
        for _ in range(steps):
            machine.synchronize(devices)
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            pipeline.step(batches, lambda output, _: models.mean_square(output))
            optimizer.step()
            machine.synchronize(devices)
            seconds = time.perf_counter() - begin
    peaks = {name: peak.allocated for name, peak in machine.peaks(devices).items()}
    return Measured(seconds=seconds, peaks=peaks)


def _forget_compiled(case: Case) -> None:
    """Else new shapes count against a limit that the ones before have used up."""
    kind = (case.model, case.size, case.frames, case.quantize)
    if _compiled_for != [kind]:
        torch.compiler.reset()
        _compiled_for[:] = [kind]


def _batches(case: Case, request: Request) -> Iterator[dict[str, Any]]:
    bucket, generator = case.bucket, torch.Generator().manual_seed(0)
    family = request.family
    shapes = family.cached_shapes(request.source, bucket.frames, bucket.height, bucket.width)
    for _ in range(case.micro_batches):
        cached = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        noise = torch.randn(shapes["latents"], generator=generator)
        sample = family.make_sample(request.source.traits, cached, noise, 0.9, dtype=torch.bfloat16)
        yield sample.inputs


def _budgets(devices: Sequence[torch.device]) -> tuple[Budget, ...]:
    if any(device.type == "cpu" for device in devices):
        cards = budgets_of_cards(parse_cards(f"{len(devices)}x RTX 4090", known_cards()))
        return tuple(replace(budget, device=str(d)) for budget, d in zip(cards, devices, strict=True))
    for budget in budgets_of_devices(devices):
        if budget.device not in _timed:
            _timed[budget.device] = measured(budget)
    now = {budget.device: budget for budget in budgets_of_devices(devices)}
    return tuple(replace(_timed[name], total=b.total, free=b.free) for name, b in now.items())


def limit(case: Case, devices: Sequence[torch.device]) -> None:
    """Give each device what the case allows it."""
    caps = case.caps * len(devices) if len(case.caps) == 1 else case.caps
    for number, device in enumerate(devices):
        if device.type == "cuda":
            machine.limit_memory([device], caps[number] if caps else None)


def compared(case: Case, plan: Plan, found: Measured | None) -> dict[str, Any]:
    """The plan's figures beside the measured ones, told at once."""
    result: dict[str, Any] = {"case": case.name, "plan": plan.as_json()}
    console.print(f"{case.name}: planned {_figures(plan.peaks, plan.seconds_per_step)}", soft_wrap=True)
    if found is None:
        console.print("  ran out of memory")
        return {**result, "measured": None}
    console.print(f"  measured {_figures(found.peaks, found.seconds)}", soft_wrap=True)
    off = {name: plan.peaks[name] / peak - 1 for name, peak in found.peaks.items()}
    good = all(
        abs(share) <= WITHIN or abs(plan.peaks[name] - found.peaks[name]) <= machine.GIB / 2
        for name, share in off.items()
    )
    peaks = ", ".join(f"{100 * share:+.1f} %" for share in off.values())
    slower = plan.seconds_per_step / found.seconds - 1
    console.print(
        f"  peaks {peaks or 'not measured'}{'' if good else ': TOO FAR OFF'}; time {100 * slower:+.0f} %"
    )
    return {
        **result,
        "measured": {"seconds": found.seconds, "peaks": found.peaks},
        "off": off,
        "time_off": slower,
    }


def _figures(peaks: dict[str, int], seconds: float) -> str:
    return f"{', '.join(map(gib, peaks.values()))}, {seconds:.2f} s a step"


def run_cases(options: argparse.Namespace) -> None:
    """Each case as it is planned."""
    for case, devices in _wanted(options, CASES, TINY_CASES):
        limit(case, devices)
        request = request_of(case, devices)
        begin = time.perf_counter()
        plan = Planner(request).best()
        console.print(f"planned in {time.perf_counter() - begin:.1f} s")
        found = measure(case, request, devices, plan.split_at)
        measuring.add_results(options.json, {f"case {case.name}": compared(case, plan, found)})


def run_edges(options: argparse.Namespace) -> None:
    """The longest clip that is accepted, and the next longer one."""
    for case, devices in _wanted(options, EDGES):
        limit(case, devices)
        accepted = _longest(case, devices)
        if accepted is None:
            console.print(f"{case.name}: nothing fits")
            continue
        for some in (accepted, replace(accepted, frames=accepted.frames + 4)):
            request = request_of(some, devices)
            plan = Planner(request).best()
            found = measure(some, request, devices, plan.split_at, EDGE_STEPS)
            measuring.add_results(options.json, {f"edge {some.name}": compared(some, plan, found)})


def _longest(case: Case, devices: Sequence[torch.device]) -> Case | None:
    for frames in range(case.frames, 0, -4):
        shorter = replace(case, frames=frames)
        if Planner(request_of(shorter, devices)).best().fits:
            return shorter
    return None


def run_splits(options: argparse.Namespace) -> None:
    """The planned boundary against others."""
    for case, devices in _wanted(options, SPLITS):
        limit(case, devices)
        planner = Planner(request_of(case, devices))
        best = planner.best()
        times: dict[int, float] = {}
        for at in sorted({*range(EVERY, CONFIGS[case.model]["num_layers"], EVERY), *best.split_at}):
            some = replace(case, at=(at,))
            request = replace(planner.request, split_at=(at,))
            plan = Planner(request, planner.trace).best()
            found = measure(some, request, devices, (at,)) if plan.fits else None
            if found is not None:
                times[at] = found.seconds
                console.print(f"{some.name}: {found.seconds:.2f} s (planned {plan.seconds_per_step:.2f})")
        chosen, fastest = best.split_at[0], min(times, key=times.__getitem__, default=None)
        console.print(f"planned at {chosen}: {times.get(chosen)} s; fastest at {fastest}")
        measuring.add_results(options.json, {f"splits {case.name}": {"planned": chosen, "seconds": times}})


def _wanted(
    options: argparse.Namespace, cases: Sequence[Case], tiny: Sequence[Case] = TINY
) -> Iterator[tuple[Case, tuple[torch.device, ...]]]:
    devices = measuring.devices_from(options.devices) if options.devices else _all_devices()
    for case in tiny if options.tiny else cases:
        if options.cases in case.name and case.stages <= len(devices):
            yield case, tuple(devices[: case.stages])


def _all_devices() -> list[torch.device]:
    return measuring.default_devices(max(2, torch.accelerator.device_count()))


PHASES = {"cases": run_cases, "edges": run_edges, "splits": run_splits}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=["cases"])
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--devices", help="for example cuda:0,cuda:1; all by default")
    parser.add_argument("--json", type=Path, default=Path("planning.json"), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters")
    return parser.parse_args()


def main() -> None:
    """Run the phases that are asked for."""
    options = parse_arguments()
    devices = measuring.devices_from(options.devices)
    facts = machine.facts(dict.fromkeys(devices))
    measuring.print_machine(facts)
    machine.wake(devices)
    measuring.add_results(options.json, {"machine": facts})
    for name in options.phase:
        PHASES[name](options)


if __name__ == "__main__":
    main()
