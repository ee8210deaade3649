from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tworeel.cli.app import app
from tworeel.demo.kinds import DEMOS, WAN, Demo
from tworeel.demo.run import MARKER, NOTE, contents_of, demo_devices, run_demo
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


@pytest.fixture(scope="module", params=DEMOS)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path]:
    """Each family's demo of 20 steps, and its folder."""
    demo, folder = DEMOS[request.param], tmp_path_factory.mktemp("demo") / "out"
    program = Program(20)
    run_demo(folder, program, demo)
    commands = ["check", "cache", "train", "convert", "sample"]
    assert [command[0] for command in program.commands] == commands
    return demo, folder


def test_a_demo_leaves_what_it_says_and_nothing_else(shown: tuple[Demo, Path]) -> None:
    demo, folder = shown
    contents = contents_of(demo)
    assert all((folder / name).exists() for name in contents)
    tops = {Path(name).parts[0] for name in (*contents, NOTE, MARKER)}
    assert {path.name for path in folder.iterdir()} == tops
    note = (folder / NOTE).read_text(encoding="utf-8")
    assert demo.variant in note and all(f"\n{name} " in note for name in contents)


def test_the_loss_of_a_demo_falls_visibly(shown: tuple[Demo, Path]) -> None:
    _, folder = shown
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert statistics.mean(losses[-5:]) < 0.75 * statistics.mean(losses[:3])
    assert all("busy/stage1" in json.loads(line) for line in lines)
    with Image.open(folder / "run" / "loss.png") as plot:
        assert plot.format == "PNG" and plot.width > 600


def test_the_loras_of_a_demo_have_the_names_of_comfyui_and_of_diffusers(shown: tuple[Demo, Path]) -> None:
    demo, folder = shown
    prefixes = {"run/lora": "diffusion_model.", "lora-diffusers": "transformer."}
    lists = ("blocks.",) if demo is WAN else ("double_", "single_", "transformer_")
    for name, prefix in prefixes.items():
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            keys = list(file.keys())
        assert keys and all(key.startswith(prefix) for key in keys)
        assert all(key.removeprefix(prefix).startswith(lists) for key in keys)


def test_a_second_demo_replaces_the_first_and_leaves_other_files(
    shown: tuple[Demo, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if shown[0] is WAN:
        pytest.skip("the other family's demo comes first")
    shutil.copytree(shown[1], folder)
    mine = folder / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    run_demo(folder, Program(2), WAN)
    assert len((folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert not (folder / "images").exists()
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_not_the_demos_is_refused_unchanged(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and no demo's folder"):
        run_demo(tmp_path, Program(1), WAN)
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_in_the_demos_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give the name of a folder"):
        run_demo(tmp_path / "file", Program(1), WAN)


def test_the_demo_has_two_stages_on_any_machine() -> None:
    assert len(demo_devices()) == 2
