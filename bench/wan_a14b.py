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
from dataclasses import dataclass, replace
from typing import Any

import measuring
import whole_run
from measuring import Meter
from real_size import TINY, Sizes, write_clips, write_model
from whole_run import Limit, Phase, RunOptions

from tworeel.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, SourceConfig
from tworeel.models.wan.family import WAN
from tworeel.training.space import require_space

LOAD = Limit(bytes=2 * 2**30, of="growth")
DISK = 45 * 2**30
"""What the model, the cache, checkpoints and the LoRA need at real size, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What the command line says."""

    sizes: Sizes
    width: int
    height: int
    frames: int
    clips: int


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
    whole_run.forget(options)
    return whole_run.train_and_tell("run", run_config(options, options.steps), WAN, LOAD)


def resume(options: Options) -> dict[str, Any]:
    """Train one more step from the checkpoint of `run`."""
    config = run_config(options, options.steps + 1)
    return whole_run.train_and_tell("resume", config, WAN, LOAD, resume=True)


def compare(options: Options) -> dict[str, Any]:
    """Time the same micro-batches pipelined and one by one."""
    return whole_run.compare_schedules(run_config(options, 1))


PHASES: dict[str, Phase[Options]] = {
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
        train=options.training(steps),
        engine=options.engine(),
    )


def read_options(arguments: argparse.Namespace) -> Options:
    """Fill in what the command line leaves open: real size, or tiny."""
    sizes = TINY if arguments.tiny else Sizes()
    small = {"width": 64, "height": 64, "frames": 5, "clips": 2, "rank": 4, "micro_batches": 4}
    real = {"width": 832, "height": 480, "frames": 49, "clips": 4, "rank": 32, "micro_batches": 8}
    return Options(
        sizes=replace(sizes, layers=arguments.layers) if arguments.layers else sizes,
        **whole_run.common_options(arguments, "wan_a14b"),
        **whole_run.given(arguments, small if arguments.tiny else real),
    )


def main() -> None:
    """Run the phases that are asked for."""
    parser = whole_run.make_parser(__doc__, PHASES)
    parser.add_argument("--layers", type=int, help="blocks of the transformer (40)")
    parser.add_argument("--frames", type=int, help="frames of a clip, 4k+1 (49)")
    arguments = parser.parse_args()
    whole_run.run_phases(read_options(arguments), arguments.phase, PHASES)


if __name__ == "__main__":
    main()
