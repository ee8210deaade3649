"""The demo: a tiny model and a drawn dataset, and the commands that a user would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table

from tworeel.config.writing import toml_value
from tworeel.demo.kinds import DEMOS, Demo
from tworeel.errors import UserError
from tworeel.files import remove, write_text_atomic
from tworeel.report.console import console, say
from tworeel.training.devices import available_devices
from tworeel.training.space import require_space

MARKER = ".tworeel-demo"
"""A folder with this file was made by the demo, which may replace what it wrote there."""

CONTENTS = {
    "run/lora.safetensors": "the LoRA, as ComfyUI, diffusers and DiffSynth read it",
    "lora-diffusers.safetensors": "the same LoRA with diffusers' names, made by 'tworeel convert'",
    "run/loss.png": "the loss of each step: it falls, so the LoRA learns",
    "previews/contact-sheet.png": "the prompt without and with the LoRA, made by 'tworeel sample'",
    "run/metrics.jsonl": "one line a step: loss, gradient norm, seconds, memory, how busy each stage was",
    "run/config.toml": "every option of the run, the defaults too; '--resume' starts from it",
    "run/checkpoints": "what a resumed run goes on from",
    "run/tensorboard": "the metrics for TensorBoard",
    "demo.toml": "what was asked of 'tworeel train'",
    "cache": "the dataset as the model's encoders see it",
}
"""What every demo writes, and what each of it is; the most useful first."""
NOTE = "WHAT_IS_WHAT.txt"

_NEEDED_SPACE = 32 * 1024**2
"""Bytes; more than all of it takes."""

_CONFIG = """\
# What the demo trains. Every option that is not here has its default; 'tworeel config' lists them all.

[model]
path = "model"
dtype = "float32"

[[data.sources]]
path = "{path}"

[data]
{data}

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

[sample]
prompts = ["{prompt}"]
size = [96, 64]
steps = 8
{sample}
"""

_INTRODUCTION = """\
This folder was written by 'tworeel demo': a whole training run with a tiny {variant}.
The model's weights are random, so the LoRA makes no pictures; its files are those of a real run.
"""


def run_demo(folder: Path, run: Callable[[Sequence[str]], None], demo: Demo) -> None:
    """Make a model and a dataset, check, cache, train on two stages, convert and sample; say what is where.

    Args:
        folder: that everything is written to. The results of an earlier demo in it are replaced.
        run: runs the program with these arguments, as a user would.
        demo: which family's.

    Raises:
        UserError: the folder holds something that is not the demo's, or the disk has no room for it.
    """
    contents = contents_of(demo)
    _clear(folder)
    require_space(folder, _NEEDED_SPACE, "the demo")
    say(f"A tiny {demo.variant} with random weights, and a drawn dataset with captions, in {folder}:")
    demo.write_model(folder / "model")
    data = folder / demo.data
    files = demo.write_data(data)
    say(f"  {folder / 'model'}, {data} ({len(files)} files)")
    config = folder / "demo.toml"
    write_text_atomic(config, _config(demo))
    for command in _commands(folder, config):
        say(f"\n$ tworeel {_as_typed(command)}")
        run(command)
    write_text_atomic(folder / NOTE, _note(demo, contents))
    console.print()
    console.print(_table(folder, contents))


def contents_of(demo: Demo) -> dict[str, str]:
    """What a demo writes, and what each of it is."""
    return {**CONTENTS, **demo.contents}


def _config(demo: Demo) -> str:
    return _CONFIG.format(
        path=demo.data, devices=toml_value(demo_devices()), prompt=demo.prompt, **demo.settings
    )


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
        written = (*CONTENTS, *(name for demo in DEMOS.values() for name in demo.contents), NOTE)
        for name in {Path(path).parts[0] for path in written}:
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
        ["sample", str(folder / "run"), "--out", str(folder / "previews")],
    ]


def _as_typed(command: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def _note(demo: Demo, contents: Mapping[str, str]) -> str:
    width = max(map(len, contents))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in contents.items()]
    return "\n".join([_INTRODUCTION.format(variant=demo.variant), *lines]) + "\n"


def _table(folder: Path, contents: Mapping[str, str]) -> Table:
    table = Table(title=f"What the demo left in {folder}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, meaning in contents.items():
        table.add_row(name, _size(folder / name), meaning)
    table.add_row(NOTE, _size(folder / NOTE), "this table")
    return table


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1000:,.1f} kB"
