"""A whole run at real size: FLUX.2-dev (32.2 B parameters), images of 512×512 or 1024×1024.

    python bench/flux2_dev.py                           everything, on the first two GPUs
    python bench/flux2_dev.py --phase run --size 1024   some phases; calls share --folder
    python bench/flux2_dev.py --phase run text --cap-gib 22.5
    python bench/flux2_dev.py --tiny                    seconds, on the CPU

Phases:

- `write`: the transformer, Mistral-3, the VAE with random weights, and images (99 GB);
- `run`: check, cache, train, checkpoint and LoRA;
- `resume`: one more step from the checkpoint;
- `text`: captions embedded by Mistral-3, spread over the devices.

Prints a table a phase and adds the figures to a JSON file.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import whole_run
from measuring import Meter, console
from real_flux2 import TINY, Sizes, captions, write_images, write_model
from whole_run import Limit, Phase, RunOptions, Watcher

from tworeel.cache.build import embed_captions
from tworeel.cache.store import CacheStore
from tworeel.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, SourceConfig
from tworeel.models.family import ModelRequest, ModelSource, TextOptions
from tworeel.models.flux2.family import FLUX2
from tworeel.training.loadable import torch_dtype
from tworeel.training.space import require_space

LOAD = Limit(bytes=8 * 2**30, of="peak")
DISK = 100 * 2**30
"""What the model, the cache, checkpoints and the LoRA need at real size, in bytes."""
QUANTIZE = ("fp8", "int8", "none")
PLACEMENTS = ("auto", "each", "spread", "cpu")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What the command line says."""

    sizes: Sizes
    size: int
    """Pixels of an image's side."""
    images: int
    captions: int
    quantize: str
    text_placement: str


def write(options: Options) -> dict[str, Any]:
    """Write the model and the images."""
    model = options.folder / "model"
    if options.sizes == Sizes():
        shutil.rmtree(model, ignore_errors=True)  # its room counts as free
        require_space(options.folder, DISK, "this benchmark")
    with Meter(options.devices) as meter:
        meter.begin("model")
        write_model(model, options.sizes)
        meter.begin("images")
        _write_images(options)
    measuring.print_phases("write", meter.phases.values())
    return {"phases": measuring.as_json(meter.phases.values())}


def run(options: Options) -> dict[str, Any]:
    """Check, cache and train from nothing."""
    whole_run.forget(options)
    if not _images(options).exists():
        _write_images(options)  # `write` may have been called with another size
    return whole_run.train_and_tell("run", run_config(options, options.steps), FLUX2, LOAD)


def resume(options: Options) -> dict[str, Any]:
    """Train one more step from the checkpoint of `run`."""
    config = run_config(options, options.steps + 1)
    return whole_run.train_and_tell("resume", config, FLUX2, LOAD, resume=True)


def text(options: Options) -> dict[str, Any]:
    """Embed captions, nothing of which the cache holds."""
    folder = options.folder / "text-cache"
    shutil.rmtree(folder, ignore_errors=True)
    with Meter(options.devices) as meter:
        watcher = _TextWatcher(meter)
        meter.begin("look")
        embed_captions(
            CacheStore(folder),
            FLUX2,
            _source(options),
            captions(options.captions),
            devices=options.devices,
            dtype=torch_dtype("bfloat16"),
            text=TextOptions(placement=options.text_placement),  # type: ignore[arg-type]  # argparse checks it
            observer=watcher,
        )
    shutil.rmtree(folder)
    phases = meter.phases.values()
    measuring.print_phases("text", phases)
    seconds = sum(phase.seconds for phase in phases)
    console.print(f"{watcher.titles[-1]}: {options.captions} captions in {seconds:.1f} s", soft_wrap=True)
    return {
        "phases": measuring.as_json(phases),
        "captions": options.captions,
        "seconds": seconds,
        "where": watcher.titles[-1],
    }


class _TextWatcher(Watcher):
    """Tells loading, which ends with the first caption, from embedding."""

    def start(self, title: str, total: int) -> None:
        self.titles.append(title)
        self._meter.begin("load and first caption" if title.startswith("Embedding") else "look")
        self._is_first = True

    def advance(self) -> None:
        if self._is_first and self.titles[-1].startswith("Embedding"):
            self._meter.begin("other captions")
        self._is_first = False

    def finish(self) -> None:
        self._meter.end()


PHASES: dict[str, Phase[Options]] = {"write": write, "run": run, "resume": resume, "text": text}


def run_config(options: Options, steps: int) -> RunConfig:
    """The configuration of the run, as a user would write it."""
    quantize: Any = None if options.quantize == "none" else options.quantize
    return RunConfig(
        model=ModelConfig(path=str(options.folder / "model"), quantize=quantize),
        data=DataConfig(
            sources=(SourceConfig(path=_images(options)),), resolution=(options.size, options.size)
        ),
        lora=LoraConfig(rank=options.rank),
        train=options.training(steps),
        engine=options.engine(),
    )


def _source(options: Options) -> ModelSource:
    found = FLUX2.locate(ModelRequest(path=str(options.folder / "model")))
    assert found is not None, "the phase write wrote it"
    return found


def _images(options: Options) -> Path:
    return options.folder / f"images-{options.size}"


def _write_images(options: Options) -> None:
    write_images(_images(options), width=options.size, height=options.size, count=options.images)


def read_options(arguments: argparse.Namespace) -> Options:
    """Fill in what the command line leaves open: real size, or tiny."""
    sizes = TINY if arguments.tiny else Sizes()
    if arguments.blocks:
        doubles, singles = map(int, arguments.blocks.split(","))
        sizes = replace(sizes, doubles=doubles, singles=singles)
    small = {"size": 64, "images": 2, "captions": 3, "rank": 4, "micro_batches": 4}
    real = {"size": 512, "images": 8, "captions": 32, "rank": 16, "micro_batches": 8}
    return Options(
        sizes=sizes,
        quantize=arguments.quantize,
        text_placement=arguments.text_placement,
        **whole_run.common_options(arguments, "flux2_dev"),
        **whole_run.given(arguments, small if arguments.tiny else real),
    )


def main() -> None:
    """Run the phases that are asked for."""
    parser = whole_run.make_parser(__doc__, PHASES)
    parser.add_argument("--size", type=int, help="pixels of an image's side (512)")
    parser.add_argument("--quantize", choices=QUANTIZE, default="fp8", help="of the frozen weights (fp8)")
    parser.add_argument("--blocks", metavar="DOUBLE,SINGLE", help="of the transformer (8,48)")
    parser.add_argument("--captions", type=int, help="of the phase text (32)")
    parser.add_argument(
        "--text-placement", choices=PLACEMENTS, default="auto", help="as cache.text_placement (auto)"
    )
    arguments = parser.parse_args()
    whole_run.run_phases(read_options(arguments), arguments.phase, PHASES)


if __name__ == "__main__":
    main()
