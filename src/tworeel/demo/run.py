"""The demo: a tiny Wan model and drawn clips, and the commands that a user would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from tworeel.config.writing import toml_value
from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.files import remove, write_text_atomic
from tworeel.report.console import console, say
from tworeel.training.devices import available_devices
from tworeel.training.space import require_space

MARKER = ".tworeel-demo"
"""A folder with this file was made by the demo, which may replace what it wrote there."""
VARIANT = "wan2.1-t2v-1.3b"

CONTENTS = {
    "run/lora.safetensors": "the LoRA, as ComfyUI, diffusers and DiffSynth read it",
    "lora-diffusers.safetensors": "the same LoRA with diffusers' names, made by 'tworeel convert'",
    "run/loss.png": "the loss of each step: it falls, so the LoRA learns",
    "run/metrics.jsonl": "one line a step: loss, gradient norm, seconds, memory, how busy each stage was",
    "run/config.toml": "every option of the run, the defaults too; '--resume' starts from it",
    "run/checkpoints": "what a resumed run goes on from",
    "run/tensorboard": "the metrics for TensorBoard",
    "demo.toml": "what was asked of 'tworeel train'",
    "clips": "the dataset: drawn clips, each with its caption in a .txt file",
    "model": f"a tiny {VARIANT} with random weights, in the layout of Wan's own repository",
    "cache": "the clips and captions as the model's encoders see them",
}
"""What the demo writes, and what each of it is; the most useful first."""
NOTE = "WHAT_IS_WHAT.txt"

_NEEDED_SPACE = 32 * 1024**2
"""Bytes; more than all of it takes."""

_CONFIG = """\
# What the demo trains. Every option that is not here has its default; 'tworeel config' lists them all.

[model]
path = "model"
dtype = "float32"

[[data.sources]]
path = "clips"

[data]
resolution = [96, 64]
frames = [1, 9, 17]

[lora]
rank = 16

[train]
output = "run"
steps = 120
micro_batches = 4
# A hundred times what a real model takes: this one has random weights.
learning_rate = 1e-2

[engine]
# Two stages, with a part of the model's blocks each.
devices = {devices}
"""

_INTRODUCTION = f"""\
This folder was written by 'tworeel demo': a whole training run with a tiny {VARIANT}.
The model's weights are random, so the LoRA makes no pictures; its files are those of a real run.
"""


def run_demo(folder: Path, run: Callable[[Sequence[str]], None]) -> None:
    """Make a model and clips, check, cache, train on two stages and convert the LoRA; say what is where.

    Args:
        folder: that everything is written to. The results of an earlier demo in it are replaced.
        run: runs the program with these arguments, as a user would.

    Raises:
        UserError: the folder holds something that is not the demo's, or the disk has no room for it.
    """
    _clear(folder)
    require_space(folder, _NEEDED_SPACE, "the demo")
    say(f"A tiny Wan model with random weights, and drawn clips with captions, in {folder}:")
    write_checkpoint(folder / "model", variant=VARIANT, layout="native")
    clips = write_clips(folder / "clips")
    say(f"  {folder / 'model'}, {folder / 'clips'} ({len(clips)} files)")
    config = folder / "demo.toml"
    write_text_atomic(config, _CONFIG.format(devices=toml_value(demo_devices())))
    for command in _commands(folder, config):
        say(f"\n$ tworeel {_as_typed(command)}")
        run(command)
    write_text_atomic(folder / NOTE, _note())
    console.print()
    console.print(_table(folder))


def demo_devices() -> list[str]:
    """Two GPUs if there are two; else two stages on the CPU."""
    gpus = [name for name in available_devices() if torch.device(name).type != "cpu"]
    return gpus[:2] if len(gpus) >= 2 else ["cpu", "cpu"]


def _clear(folder: Path) -> None:
    """Make the folder, or remove what an earlier demo wrote into it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a folder for the demo")
    is_ours = (folder / MARKER).exists()
    if folder.exists() and any(folder.iterdir()) and not is_ours:
        raise UserError(f"{folder}: is not empty and no demo's folder; nothing was changed; give another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        for name in {Path(path).parts[0] for path in (*CONTENTS, NOTE)}:
            if (folder / name).exists():
                remove(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the demo there: {error.strerror}") from error


def _commands(folder: Path, config: Path) -> list[list[str]]:
    lora, converted = (str(folder / name) for name in list(CONTENTS)[:2])
    return [
        ["check", str(config)],
        ["cache", str(config)],
        ["train", str(config)],
        ["convert", lora, converted, "--to", "diffusers"],
    ]


def _as_typed(command: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def _note() -> str:
    width = max(map(len, CONTENTS))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in CONTENTS.items()]
    return "\n".join([_INTRODUCTION, *lines]) + "\n"


def _table(folder: Path) -> Table:
    table = Table(title=f"What the demo left in {folder}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, meaning in CONTENTS.items():
        table.add_row(name, _size(folder / name), meaning)
    table.add_row(NOTE, _size(folder / NOTE), "this table")
    return table


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1000:,.1f} kB"
