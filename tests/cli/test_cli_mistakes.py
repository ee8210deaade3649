"""Mistakes that people make, from end to end: what they read, and that nothing was read or written for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.training.run_folder import RunFolder
from tworeel.weights.tensor_files import TensorFiles

Run = Callable[..., Any]


@dataclass
class Attempt:
    """A run that would start, before a case spoils it."""

    here: Path
    model: Path
    """A tiny checkpoint; `own_model` makes a copy that may be spoiled."""
    clips: Path
    """Two videos and an image, the attempt's own."""
    experts: Path
    """A tiny model of two experts, not to be changed."""
    stack: ExitStack
    """What is held while the run tries to start."""
    devices: str = "cpu,cpu"
    more: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        settings = ("data.resolution=[128,96]", "data.frames=[1,5]", "lora.rank=2", "train.steps=1")
        given = [part for setting in settings for part in ("--set", setting)]
        paths = ["--model", str(self.model), "--data", str(self.clips), "--output", str(self.here / "out")]
        return ["train", *paths, "--devices", self.devices, *given, *self.more]

    def own_model(self) -> Path:
        self.model = Path(shutil.copytree(self.model, self.here / "model"))
        return self.model


Words = tuple[str, ...]
Case = Callable[[Attempt], Words]
"""Makes the mistake and returns what the one line about it has to say."""


def wrong_type(attempt: Attempt) -> Words:
    (attempt.here / "run.toml").write_text('[train]\nseed = "lucky"\n', encoding="utf-8")
    attempt.more = [str(attempt.here / "run.toml")]
    return "train.seed", '"lucky"', "must be an integer >= 0"


def unknown_section(attempt: Attempt) -> Words:
    (attempt.here / "run.toml").write_text("[trian]\nsteps = 1\n", encoding="utf-8")
    attempt.more = [str(attempt.here / "run.toml")]
    return "[trian]", "unknown section", "did you mean 'train'?"


def empty_model_folder(attempt: Attempt) -> Words:
    attempt.model = attempt.here / "empty"
    attempt.model.mkdir()
    return "model.path", str(attempt.model)


def empty_clips_folder(attempt: Attempt) -> Words:
    attempt.clips = attempt.here / "empty"
    attempt.clips.mkdir()
    return str(attempt.clips), "no videos or images here", ".mp4"


def clip_without_caption(attempt: Attempt) -> Words:
    (attempt.clips / "clip_1.txt").unlink()
    return str(attempt.clips / "clip_1.mp4"), "clip_1.txt"


def truncated_video(attempt: Attempt) -> Words:
    path = attempt.clips / "clip_0.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return (str(path),)


def sound_instead_of_a_video(attempt: Attempt) -> Words:
    path = attempt.clips / "clip_0.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path), "no video stream", "audio"


def one_frame_for_a_bucket_of_81(attempt: Attempt) -> Words:
    path = attempt.clips / "clip_0.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        picture = np.zeros((96, 128, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    for other in (*attempt.clips.glob("clip_1.*"), *attempt.clips.glob("image.*")):
        other.unlink()
    attempt.more = ["--set", "data.frames=[81]"]
    return str(path), "too short: 1 frames", "allowed (data.frames): 81"


def model_of_another_family(attempt: Attempt) -> Words:
    attempt.model = attempt.here / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, attempt.model)
    return "model.path", str(attempt.model), "not a model of a known family (wan, flux2)"


def truncated_weights(attempt: Attempt) -> Words:
    path = sorted(attempt.own_model().glob("*.safetensors"))[1]
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    return str(path), f"{whole - 1000:,}".replace(",", ""), str(whole)


def expert_that_the_model_does_not_have(attempt: Attempt) -> Words:
    attempt.more = ["--expert", "high"]
    return "model.expert = 'high'", "has no experts"


def expert_whose_folder_is_gone(attempt: Attempt) -> Words:
    attempt.model = Path(shutil.copytree(attempt.experts, attempt.here / "experts"))
    shutil.rmtree(attempt.model / "high_noise_model")
    attempt.more = ["--expert", "high"]
    return "high", "low", str(attempt.model)


def more_stages_than_blocks(attempt: Attempt) -> Words:
    attempt.devices = ",".join(["cpu"] * 5)
    return "engine: ", "5", "4"


def device_that_does_not_exist(attempt: Attempt) -> Words:
    attempt.devices = "cpu,cuda:77"
    return "engine.devices: 'cuda:77' does not exist", "cpu"


def device_without_a_name(attempt: Attempt) -> Words:
    attempt.devices = "cpu,,cpu"
    return ("engine.devices: '' does not exist",)


def folder_of_another_run(attempt: Attempt) -> Words:
    attempt.stack.enter_context(RunFolder(attempt.here / "out").locked())
    return "another run is writing to", str(attempt.here / "out"), f"process {os.getpid()}"


def checkpoint_that_is_none(attempt: Attempt) -> Words:
    attempt.more = ["--resume-from", str(attempt.clips)]
    return str(attempt.clips), "no checkpoint", "manifest.json"


CASES: tuple[Case, ...] = (
    wrong_type,
    unknown_section,
    empty_model_folder,
    empty_clips_folder,
    clip_without_caption,
    truncated_video,
    sound_instead_of_a_video,
    one_frame_for_a_bucket_of_81,
    model_of_another_family,
    truncated_weights,
    expert_that_the_model_does_not_have,
    expert_whose_folder_is_gone,
    more_stages_than_blocks,
    device_that_does_not_exist,
    device_without_a_name,
    folder_of_another_run,
    checkpoint_that_is_none,
)
REAL: tuple[Case, ...] = (
    truncated_video,
    sound_instead_of_a_video,
    truncated_weights,
    folder_of_another_run,
)
"""Those that are tried with the program itself, in a process of its own, too: libraries write past Python's
stderr, and the run's folder is another process's."""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("experts"), variant="wan2.2-t2v-a14b")


@pytest.fixture
def attempt(tmp_path: Path, tiny_model: Path, clips: Path, experts: Path) -> Iterator[Attempt]:
    own = Path(shutil.copytree(clips, tmp_path / "clips"))
    with ExitStack() as stack:
        yield Attempt(here=tmp_path, model=tiny_model, clips=own, experts=experts, stack=stack)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_mistake_is_one_line_and_reads_no_weight(
    run: Run, attempt: Attempt, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TensorFiles, *args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "read", refuse)
    words = case(attempt)
    done = run(*attempt.arguments)
    assert done.code == 2
    is_told(done.err, words)
    nothing_was_made(attempt)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.__name__)
def test_the_program_itself_tells_it_and_leaves_nothing(attempt: Attempt, case: Case) -> None:
    words = case(attempt)
    done = subprocess.run(
        [sys.executable, "-m", "tworeel", *attempt.arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=attempt.here,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    is_told(done.stderr, words)
    nothing_was_made(attempt)


def is_told(text: str, words: Words) -> None:
    """One line says all of it, and there is no other kind of line."""
    lines = text.splitlines()
    assert "Traceback" not in text and all(line.startswith("error: ") for line in lines), text
    assert any(all(word in line for word in words) for line in lines), json.dumps([words, lines], indent=1)


def nothing_was_made(attempt: Attempt) -> None:
    """No latent, no checkpoint, no LoRA: at most the folders and the lock of the run."""
    made = {path.name for folder in ("out", "cache") for path in (attempt.here / folder).rglob("*")}
    assert made <= {"run.lock", "run.pid"}
