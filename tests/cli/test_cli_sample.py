from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]
QUICK = ("--steps", "2", "--size", "64x64", "--frames", "1")


def test_a_runs_folder_is_enough(run: Run, small_run: list[str], tmp_path: Path) -> None:
    assert run("train", *small_run, "--steps", "2").code == 0
    done = run("sample", "output", "--prompt", "a red ball", "--prompt", "the snow", *QUICK)
    assert done.code == 0, done.err
    folder = tmp_path / "output" / "samples" / "sample-1"
    assert f"Contact sheet: {folder / 'contact-sheet.png'}" in done.out and "4 pictures" in done.out
    names = {f"prompt-0{row}-strength-{strength}.png" for row in (1, 2) for strength in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {*names, "contact-sheet.png"}
    assert Image.open(folder / "prompt-01-strength-1.png").size == (64, 64)
    again = run("sample", "output", "--prompt", "a red ball", *QUICK, "--strength", "1", "--out", "mine")
    assert again.code == 0, again.err
    first, second = (place / "prompt-01-strength-1.png" for place in (folder, tmp_path / "mine"))
    assert first.read_bytes() == second.read_bytes()


def test_earlier_pictures_are_not_written_over(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (sheet := tmp_path / "contact-sheet.png").write_bytes(b"mine")
    given = ["--model", tiny_model, "--devices", "cpu", "--prompt", "a ball", "--strength", "0"]
    done = run("sample", *given, "--out", tmp_path)
    assert done.code == 2
    assert done.err == f"error: {tmp_path}: holds a contact sheet already; choose another folder\n"
    assert sheet.read_bytes() == b"mine"


def test_a_lora_and_a_model_are_enough(run: Run, small_run: list[str], tiny_model: Path) -> None:
    assert run("train", *small_run, "--steps", "2").code == 0
    options = ["--model", tiny_model, "--lora", "output/lora.safetensors", "--devices", "cpu,cpu"]
    done = run("sample", *options, "--prompt", "a ball", *QUICK, "--strength", "0.5", "--seed", "3")
    assert done.code == 0, done.err
    assert "1 picture beside it" in done.out


def test_what_the_file_says_is_rendered_where_no_option_says_otherwise(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f"model.path = '{tiny_model}'\ndata.sources = [{{path = 'clips'}}]\nengine.devices = ['cpu']\n"
        "[sample]\nprompts = ['a ball', 'the snow']\nstrengths = [0]\n"
        "size = [64, 32]\nframes = 5\nsteps = 1\n",
        encoding="utf-8",
    )
    assert run("sample", "run.toml").code == 0
    folder = tmp_path / "output" / "samples" / "sample-1"
    names = ["contact-sheet.png", "prompt-01-strength-0.mp4", "prompt-02-strength-0.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere: no such file"),
        ((".",), "holds no config.toml; give the folder of a run"),
        (("--size", "64"), "--size 64: must be width x height, for example 832x480"),
        (("--expert-lora", "high"), "--expert-lora high: must be EXPERT=FILE"),
        (("--lora", "gone.safetensors"), "gone.safetensors"),
        (("--lora", "lora.pt"), "lora.pt: a LoRA must be a .safetensors file"),
        ((), "there is no LoRA yet; give one with --lora, or render with --strength 0"),
        (("--expert-lora", "high=x.safetensors"), "--expert-lora high=x.safetensors: no such expert"),
        (("--frames", "4"), "sample.frames = 4: wan2.1-t2v-1.3b takes 4k+1 frames"),
        (("--image", "x.png"), "takes no such image"),
        (("--steps", "0"), "sample.steps = 0: must be an integer > 0"),
    ],
)
def test_a_mistake_is_one_clear_line_and_makes_nothing(
    run: Run, tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = ["--model", str(tiny_model), "--devices", "cpu", "--prompt", "a ball"]
    done = run("sample", *given, *arguments)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and words in done.err
    assert not list(tmp_path.iterdir())


def test_several_mistakes_are_said_together(run: Run, tiny_model: Path) -> None:
    done = run("sample", "--model", tiny_model, "--devices", "cuda:77", "--frames", "4", "--lora", "gone.pt")
    assert done.code == 2
    assert len(done.err.splitlines()) == 4
