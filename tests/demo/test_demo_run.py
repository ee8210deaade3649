from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tworeel.cli.app import app
from tworeel.demo.run import CONTENTS, MARKER, NOTE, demo_devices, run_demo
from tworeel.errors import UserError


@dataclass
class Program:
    """Runs the commands as the program does, with fewer steps, and remembers them."""

    steps: int
    commands: list[list[str]] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str]) -> None:
        self.commands.append(list(arguments))
        more = ["--steps", str(self.steps)] if arguments[0] == "train" else []
        app([*arguments, *more], standalone_mode=False)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of 20 steps."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    program = Program(20)
    run_demo(folder, program)
    assert [command[0] for command in program.commands] == ["check", "cache", "train", "convert"]
    return folder


def test_the_demo_leaves_what_it_says_and_nothing_else(demo_folder: Path) -> None:
    assert all((demo_folder / name).exists() for name in CONTENTS)
    tops = {Path(name).parts[0] for name in (*CONTENTS, NOTE, MARKER)}
    assert {path.name for path in demo_folder.iterdir()} == tops
    note = (demo_folder / NOTE).read_text(encoding="utf-8")
    assert all(f"\n{name} " in note for name in CONTENTS)


def test_the_loss_of_the_demo_falls_visibly(demo_folder: Path) -> None:
    lines = (demo_folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert statistics.mean(losses[-5:]) < 0.75 * statistics.mean(losses[:3])
    assert all("busy/stage1" in json.loads(line) for line in lines)
    with Image.open(demo_folder / "run" / "loss.png") as plot:
        assert plot.format == "PNG" and plot.width > 600


def test_the_loras_of_the_demo_have_the_names_of_comfyui_and_of_diffusers(demo_folder: Path) -> None:
    for name, prefix in {
        "run/lora": "diffusion_model.blocks.",
        "lora-diffusers": "transformer.blocks.",
    }.items():
        with safe_open(demo_folder / f"{name}.safetensors", "pt") as file:
            assert all(key.startswith(prefix) for key in file.keys())  # noqa: SIM118  not a mapping


def test_a_second_demo_replaces_the_first_and_leaves_other_files(demo_folder: Path) -> None:
    mine = demo_folder / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    before = (demo_folder / "run" / "lora.safetensors").stat().st_mtime_ns
    run_demo(demo_folder, Program(2))
    assert (demo_folder / "run" / "lora.safetensors").stat().st_mtime_ns > before
    assert len((demo_folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_not_the_demos_is_refused_unchanged(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and no demo's folder"):
        run_demo(tmp_path, Program(1))
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_in_the_demos_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give the name of a folder"):
        run_demo(tmp_path / "file", Program(1))


def test_the_demo_has_two_stages_on_any_machine() -> None:
    assert len(demo_devices()) == 2
