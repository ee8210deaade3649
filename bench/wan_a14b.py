"""A whole run at real size: an expert of Wan 2.2 T2V-A14B (14.29 B parameters), 480×832, 49 frames.

    python bench/wan_a14b.py                       everything, on the first two GPUs
    python bench/wan_a14b.py --phase write run     some phases; calls share --folder
    python bench/wan_a14b.py --tiny                seconds, on the CPU

Phases:

- `write`: the expert, UMT5-XXL and the VAE with random weights, and clips (41 GB);
- `run`: check, cache, train, checkpoint and LoRA;
- `resume`: one more step from the checkpoint;
- `compare`: the same micro-batches pipelined and one by one.

Prints a table a phase and adds the figures to a JSON file.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import schedules
import torch
from measuring import Meter, console, gib
from real_size import TINY, Sizes, write_clips, write_model

from tworeel.benchmarks import machine
from tworeel.config.schema import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from tworeel.engine import Pipeline, attention_backend
from tworeel.errors import UserError
from tworeel.lora.files import load_lora
from tworeel.lora.naming import Naming
from tworeel.models.wan.family import WAN
from tworeel.report.benchmark import percent
from tworeel.training.assembly import cache_clips, load_model, split_model
from tworeel.training.loadable import torch_dtype
from tworeel.training.loop import StepReport
from tworeel.training.micro_batches import MicroBatches, run_transformer, weighted_loss
from tworeel.training.objective import NoiseLevels
from tworeel.training.order import Order
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun
from tworeel.training.run import train
from tworeel.training.space import require_space

LOAD_LIMIT = 2 * 2**30
"""Host memory that loading may take, in bytes."""
DISK = 45 * 2**30
"""What the model, the cache, checkpoints and the LoRA need at real size, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    folder: Path
    json: Path
    devices: tuple[torch.device, ...]
    sizes: Sizes
    width: int
    height: int
    frames: int
    clips: int
    rank: int
    micro_batches: int
    steps: int
    residency: str
    streamed: tuple[int, ...] | None = None
    eager: bool = False


class Watcher(SilentRun):
    """Tells the meter which phase of a run begins, and keeps what each step reports."""

    def __init__(self, meter: Meter) -> None:
        self.reports: list[StepReport] = []
        self._meter = meter
        self._title = ""

    def say(self, line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    def start(self, title: str, total: int) -> None:
        self._title = title
        self._meter.begin("check" if title == "Scanning clips" else "cache")

    def finish(self) -> None:
        # From the end of the cache's last part until training begins, the model is loaded.
        self._meter.begin("cache" if self._title == "Scanning clips" else "load")

    def train(self, first: int, last: int) -> None:
        self._meter.begin(f"step {first}")
        self._last = last

    def step(self, report: StepReport) -> None:
        self.reports.append(report)
        done = report.step == self._last
        self._meter.begin("checkpoint and LoRA" if done else f"step {report.step + 1}")


def write(options: Options) -> dict[str, Any]:
    """Write the model and the clips."""
    if options.sizes == Sizes():
        require_space(options.folder, DISK, "this benchmark")
    with Meter(options.devices) as meter:
        meter.begin("model")
        write_model(options.folder / "model", options.sizes)
        meter.begin("clips")
        # A few frames more than are used, as real clips have.
        shape = {"width": options.width, "height": options.height, "frames": options.frames + 3}
        write_clips(options.folder / "clips", count=options.clips, **shape)
    measuring.print_phases("write", meter.phases.values())
    return {"phases": measuring.as_json(meter.phases.values())}


def run(options: Options) -> dict[str, Any]:
    """Check, cache and train from nothing."""
    for name in ("run", "cache"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    return _train(options, "run", options.steps)


def resume(options: Options) -> dict[str, Any]:
    """Train one more step from the checkpoint of `run`."""
    return _train(options, "resume", options.steps + 1)


def compare(options: Options) -> dict[str, Any]:
    """Time the same micro-batches pipelined and one by one."""
    config = run_config(options, 1)
    job = preflight(config, SilentRun())
    index = cache_clips(config, job, SilentRun())
    model = load_model(config, job)
    division = split_model(config, job, model)
    batches = MicroBatches(
        family=job.family,
        traits=job.source.traits,
        clips=job.clips,
        index=index,
        order=Order(job.clips, [1.0], config.train.seed),
        levels=NoiseLevels(sigma_range=job.source.traits.sigma_range),
        config=config.train,
        dtype=torch_dtype(config.model.dtype),
    ).of_step(0)
    pipeline = Pipeline(division, forward=run_transformer, slack=config.engine.slack)
    with attention_backend(config.engine.attention, job.placement.devices):
        found = schedules.compare(pipeline, batches, weighted_loss, rounds=1)
    measuring.print_table("compare", ("schedule", "seconds a clip", "busy"), schedules.comparison_rows(found))
    return {**asdict(found), "ratio": found.ratio}


PHASES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "write": write,
    "run": run,
    "resume": resume,
    "compare": compare,
}


def run_config(options: Options, steps: int) -> RunConfig:
    """The configuration of the run, as a user would write it."""
    return RunConfig(
        model=ModelConfig(path=str(options.folder / "model"), expert="high"),
        data=DataConfig(
            sources=(SourceConfig(path=options.folder / "clips"),),
            resolution=(options.width, options.height),
            frames=(options.frames,),
        ),
        lora=LoraConfig(rank=options.rank),
        train=TrainConfig(
            output=options.folder / "run",
            steps=steps,
            micro_batches=options.micro_batches,
            tensorboard=False,
        ),
        engine=EngineConfig(
            devices=tuple(map(str, options.devices)),
            residency=options.residency,  # type: ignore[arg-type]  # pydantic checks it
            streamed_blocks=options.streamed,
            compile=False if options.eager else None,
        ),
    )


def _train(options: Options, name: str, steps: int) -> dict[str, Any]:
    with Meter(options.devices) as meter:
        watcher = Watcher(meter)
        meter.begin("check")
        result = train(run_config(options, steps), resume=name == "resume", observer=watcher)
    phases = list(meter.phases.values())
    measuring.print_phases(name, phases)
    _print_steps(name, watcher.reports, options.micro_batches)
    lora = load_lora(result.lora, Naming.of(WAN))
    layers = len(lora.modules)
    load = meter.phases["load"].host_growth
    verdict = "as it should be" if load < LOAD_LIMIT else "TOO MUCH"
    console.print(f"loading took {gib(load)} of host memory, the limit is {gib(LOAD_LIMIT)}: {verdict}")
    console.print(f"LoRA: {result.lora}, {layers} layers, {gib(result.lora.stat().st_size)}", soft_wrap=True)
    return {
        "phases": measuring.as_json(phases),
        "steps": [_as_json(report, options.micro_batches) for report in watcher.reports],
        "load_host_growth": load,
        "pinned_peak": machine.pinned_memory(),
        "lora_bytes": result.lora.stat().st_size,
        "lora_layers": layers,
    }


def _as_json(report: StepReport, micro_batches: int) -> dict[str, Any]:
    assert math.isfinite(report.loss)
    return {**asdict(report), "seconds_per_clip": report.seconds / micro_batches}


def _print_steps(title: str, reports: Sequence[StepReport], micro_batches: int) -> None:
    measuring.print_table(
        f"{title}: steps of {micro_batches} clips",
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


def read_options(arguments: argparse.Namespace) -> Options:
    """Fill in what the command line leaves open: real size, or tiny."""
    sizes = TINY if arguments.tiny else Sizes()
    small = {"width": 64, "height": 64, "frames": 5, "clips": 2, "rank": 4, "micro_batches": 4}
    real = {"width": 832, "height": 480, "frames": 49, "clips": 4, "rank": 32, "micro_batches": 8}
    shape = small if arguments.tiny else real
    given = {key: value for key in shape if (value := getattr(arguments, key, None)) is not None}
    return Options(
        folder=arguments.folder,
        json=arguments.json or arguments.folder / "wan_a14b.json",
        devices=tuple(measuring.devices_from(arguments.devices)),
        sizes=replace(sizes, layers=arguments.layers) if arguments.layers else sizes,
        residency=arguments.residency,
        streamed=tuple(map(int, arguments.streamed.split(","))) if arguments.streamed else None,
        eager=arguments.eager,
        steps=arguments.steps,
        **{**shape, **given},
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("tworeel-bench"), help="where everything goes")
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES))
    parser.add_argument("--devices", help="one a stage, for example cuda:0,cuda:1; the first two by default")
    parser.add_argument("--residency", default="auto", help="as engine.residency (auto)")
    parser.add_argument("--streamed", help="as engine.streamed_blocks, for example 8,8")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--cap-gib", type=float, help="GiB that torch may use for each stage")
    parser.add_argument("--layers", type=int, help="blocks of the transformer (40)")
    parser.add_argument("--frames", type=int, help="frames of a clip, 4k+1 (49)")
    parser.add_argument("--rank", type=int, help="of the LoRA (32)")
    parser.add_argument("--micro-batches", type=int, help="clips of a step (8)")
    parser.add_argument("--steps", type=int, default=3, help="of the phase run (3)")
    parser.add_argument("--json", type=Path, help="file for the figures; <folder>/wan_a14b.json by default")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters")
    return parser.parse_args()


def main() -> None:
    """Run the phases that are asked for."""
    arguments = parse_arguments()
    options = read_options(arguments)
    facts = machine.facts(options.devices)
    measuring.print_machine(facts)
    if arguments.cap_gib:
        try:
            machine.limit_memory(options.devices, arguments.cap_gib)
        except UserError as error:
            raise SystemExit(str(error)) from None
    machine.wake(options.devices)
    settings = {key: str(value) for key, value in asdict(options).items()} | {"cap_gib": arguments.cap_gib}
    for name in arguments.phase:
        results = PHASES[name](options)
        measuring.add_results(options.json, {name: {"machine": facts, "options": settings, **results}})
        # The model of a phase hangs in cycles: the next one needs its memory.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


if __name__ == "__main__":
    main()
