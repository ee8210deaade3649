"""What the whole runs at real size share: options, the watched run, what is told and written."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import measuring
import schedules
import torch
from measuring import Meter, console, gib

from tworeel.benchmarks import machine
from tworeel.config.schema import EngineConfig, RunConfig, TrainConfig
from tworeel.engine import Pipeline, attention_backend
from tworeel.engine.releasing import release_memory
from tworeel.errors import UserError
from tworeel.lora.files import load_lora
from tworeel.lora.naming import Naming
from tworeel.models.family import Family
from tworeel.report.benchmark import percent
from tworeel.training.assembly import cache_clips, load_model, make_micro_batches, split_model
from tworeel.training.micro_batches import run_transformer, weighted_loss
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun, StepReport
from tworeel.training.run import train


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says of any whole run."""

    folder: Path
    json: Path
    devices: tuple[torch.device, ...]
    cap_gib: float | None
    rank: int
    micro_batches: int
    steps: int
    residency: str
    streamed: tuple[int, ...] | None = None
    eager: bool = False

    def engine(self) -> EngineConfig:
        """How the run's configuration says it."""
        return EngineConfig(
            devices=tuple(map(str, self.devices)),
            residency=self.residency,  # type: ignore[arg-type]  # pydantic checks it
            streamed_blocks=self.streamed,
            compile=False if self.eager else None,
        )

    def training(self, steps: int) -> TrainConfig:
        """The same of what is trained."""
        return TrainConfig(
            output=self.folder / "run", steps=steps, micro_batches=self.micro_batches, tensorboard=False
        )


Options = TypeVar("Options", bound=RunOptions)
Phase = Callable[[Options], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What loading may take of the host's memory."""

    bytes: int
    of: str
    """`growth` within the phase, or the `peak` of the process; what is pinned is no part of either."""


class Watcher(SilentRun):
    """Tells the meter which phase of a run begins, and keeps what each step reports."""

    def __init__(self, meter: Meter) -> None:
        self.reports: list[StepReport] = []
        self.said: list[str] = []
        self.titles: list[str] = []
        self._meter = meter

    def say(self, line: str) -> None:
        self.said.append(line)
        console.print(line, markup=False, soft_wrap=True)

    def start(self, title: str, total: int) -> None:
        self.titles.append(title)
        self._meter.begin("check" if title == "Scanning clips" else "cache")

    def finish(self) -> None:
        # From the end of the cache's last part until training begins, the model is loaded.
        self._meter.begin("cache" if self.titles[-1] == "Scanning clips" else "load")

    def train(self, first: int, last: int, losses: Sequence[float]) -> None:
        self._meter.begin(f"step {first}")
        self._last = last

    def step(self, report: StepReport) -> None:
        self.reports.append(report)
        done = report.step == self._last
        self._meter.begin("checkpoint and LoRA" if done else f"step {report.step + 1}")


def forget(options: RunOptions) -> None:
    """Remove what an earlier run left, so that this one begins from nothing."""
    for name in ("run", "cache"):
        shutil.rmtree(options.folder / name, ignore_errors=True)


def train_and_tell(
    name: str, config: RunConfig, family: Family, limit: Limit, *, resume: bool = False
) -> dict[str, Any]:
    """Check, cache, load, train, save; print what it took and return it."""
    count = config.train.micro_batches
    with Meter([torch.device(device) for device in config.engine.devices or ()]) as meter:
        watcher = Watcher(meter)
        meter.begin("check")
        result = train(config, resume=resume, anyway=True, observer=watcher)
    phases = list(meter.phases.values())
    measuring.print_phases(name, phases)
    _print_steps(name, watcher.reports, count)
    layers = len(load_lora(result.lora, Naming.of(family)).modules)
    _judge_loading(meter.phases["load"], limit)
    console.print(f"LoRA: {result.lora}, {layers} layers, {gib(result.lora.stat().st_size)}", soft_wrap=True)
    return {
        "phases": measuring.as_json(phases),
        "steps": [_as_json(report, count) for report in watcher.reports],
        "load_host_growth": meter.phases["load"].host_growth,
        "load_host_peak": meter.phases["load"].host_peak,
        "pinned_peak": machine.pinned_memory(),
        "lora_bytes": result.lora.stat().st_size,
        "lora_layers": layers,
        "said": watcher.said,
    }


def _judge_loading(load: measuring.Phase, limit: Limit) -> None:
    taken = load.host_growth if limit.of == "growth" else load.host_peak
    verdict = "as it should be" if taken < limit.bytes else "TOO MUCH"
    console.print(
        f"loading took {gib(taken)} of host memory ({limit.of}, without what is pinned), "
        f"the limit is {gib(limit.bytes)}: {verdict}",
        soft_wrap=True,
    )


def compare_schedules(config: RunConfig) -> dict[str, Any]:
    """Time the same micro-batches pipelined and one by one."""
    job = preflight(config, SilentRun())
    index = cache_clips(config, job, SilentRun())
    division = split_model(config, job, load_model(config, job))
    batches = make_micro_batches(config, job, index).of_step(0)
    pipeline = Pipeline(division, forward=run_transformer, slack=config.engine.slack)
    with attention_backend(config.engine.attention, job.placement.devices):
        found = schedules.compare(pipeline, batches, weighted_loss, rounds=1)
    measuring.print_table("compare", ("schedule", "seconds a clip", "busy"), schedules.comparison_rows(found))
    return {**asdict(found), "ratio": found.ratio}


def _as_json(report: StepReport, micro_batches: int) -> dict[str, Any]:
    assert math.isfinite(report.loss)
    return {**asdict(report), "seconds_per_clip": report.seconds / micro_batches}


def _print_steps(title: str, reports: Sequence[StepReport], micro_batches: int) -> None:
    measuring.print_table(
        f"{title}: steps of {micro_batches}",
        ("step", "seconds", "seconds a clip", "loss", "gradient norm", "busy"),
        (
            (
                str(report.step),
                f"{report.seconds:.2f}",
                f"{report.seconds / micro_batches:.3f}",
                f"{report.loss:.4f}",
                f"{report.grad_norm:.4f}",
                percent(report.busy),
            )
            for report in reports
        ),
    )


def make_parser(description: str | None, phases: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options of any whole run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("tworeel-bench"), help="where everything goes")
    parser.add_argument("--phase", choices=phases, nargs="+", default=list(phases))
    parser.add_argument("--devices", help="one a stage, for example cuda:0,cuda:1; the first two by default")
    parser.add_argument("--residency", default="auto", help="as engine.residency (auto)")
    parser.add_argument("--streamed", help="as engine.streamed_blocks, for example 8,8")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--cap-gib", type=float, help="GiB that torch may use for each stage")
    parser.add_argument("--rank", type=int, help="of the LoRA (32; of FLUX.2 16)")
    parser.add_argument("--micro-batches", type=int, help="of a step (8)")
    parser.add_argument("--steps", type=int, default=3, help="of the phase run (3)")
    parser.add_argument("--json", type=Path, help="file for the figures; <folder>/<script>.json by default")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters")
    return parser


def common_options(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `make_parser` has read, as arguments of `RunOptions`; the rank and the micro-batches apart."""
    return {
        "folder": arguments.folder,
        "json": arguments.json or arguments.folder / f"{name}.json",
        "devices": tuple(measuring.devices_from(arguments.devices)),
        "cap_gib": arguments.cap_gib,
        "residency": arguments.residency,
        "streamed": tuple(map(int, arguments.streamed.split(","))) if arguments.streamed else None,
        "eager": arguments.eager,
        "steps": arguments.steps,
    }


def given(arguments: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults, with what the command line says instead."""
    said = {name: getattr(arguments, name, None) for name in defaults}
    return defaults | {name: value for name, value in said.items() if value is not None}


def run_phases(options: Options, wanted: Sequence[str], phases: Mapping[str, Phase[Options]]) -> None:
    """Run the phases that are asked for; the figures of each are written as soon as it is done."""
    facts = machine.facts(options.devices)
    measuring.print_machine(facts)
    settings = {key: str(value) for key, value in asdict(options).items()} | {"cap_gib": options.cap_gib}
    try:
        machine.limit_memory(options.devices, options.cap_gib)
        machine.wake(options.devices)
        for name in wanted:
            results = phases[name](options)
            measuring.add_results(options.json, {name: {"machine": facts, "options": settings, **results}})
            # The model of a phase hangs in cycles: the next one needs its memory.
            release_memory()
    except UserError as error:
        raise SystemExit(str(error)) from None
