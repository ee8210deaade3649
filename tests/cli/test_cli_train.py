from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tworeel.errors import UserError

Run = Callable[..., Any]


def test_a_run_is_trained_kept_from_being_overwritten_and_resumed(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    done = run("train", *small_run, "--steps", "2")
    assert done.code == 0, done.err
    lora = tmp_path / "output" / "lora.safetensors"
    assert f"Your LoRA: {lora}" in done.out
    assert lora.exists() and (tmp_path / "output" / "loss.png").exists()

    again = run("train", *small_run, "--steps", "2")
    assert again.code == 2
    assert "holds a run with checkpoints; go on with --resume" in again.err

    looked = run("check", *small_run)
    assert looked.code == 0 and "holds a run: 'tworeel train' needs --resume" in looked.out

    wider = run("train", tmp_path / "output" / "config.toml", "--resume", "--steps", "3", "--rank", "4")
    (line,) = wider.err.splitlines()
    assert wider.code == 2 and line.startswith("error: lora.rank = 4: ") and "was trained with 2" in line
    assert "Reading" not in wider.out

    more = run("train", tmp_path / "output", "--resume", "--steps", "3")  # of a folder its own
    assert more.code == 0, more.err
    assert "resuming after step 2" in more.out
    assert len((tmp_path / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3

    moved = tmp_path / "moved"
    (tmp_path / "output").rename(moved)
    astray = run("train", moved / "config.toml", "--resume", "--steps", "4")
    assert astray.code == 2 and "with a run's checkpoints; it was moved or copied" in astray.err
    assert f"--set train.output={moved}" in astray.err and not (tmp_path / "output").exists()
    moved.rename(tmp_path / "output")

    earlier = run("convert", lora, tmp_path / "kohya.safetensors", "--to", "kohya")
    assert earlier.code == 0, earlier.err
    assert "(comfyui) ->" in earlier.out and "rank 2" in earlier.out


def test_everything_wrong_is_listed_and_exits_with_2(run: Run, tiny_model: Path) -> None:
    done = run("train", "--set", "train.stps=4", "--set", "train.steps=0", "--model", tiny_model)
    assert done.code == 2
    lines = done.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "error: train.stps = 4: unknown key (did you mean 'steps'?)" in lines


def test_a_file_of_cards_that_is_not_there_is_told_before_anything_is_encoded(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    done = run("train", *small_run, "--cards", "nothing.toml", "--set", "lora.targets=none")
    assert done.code == 2 and len(done.err.splitlines()) == 2, done.err
    assert "error: --cards nothing.toml: No such file" in done.err and "lora.targets" in done.err
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(("options", "anyway"), [((), False), (("--anyway",), True)])
def test_only_with_anyway_a_plan_that_does_not_fit_is_followed(
    run: Run, small_run: list[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], anyway: bool
) -> None:
    asked: list[bool] = []

    def train(*_: object, anyway: bool, **__: object) -> None:
        asked.append(anyway)
        raise UserError("the plan does not fit")

    monkeypatch.setattr("tworeel.training.run.train", train)
    assert run("train", *small_run, *options).code == 2
    assert asked == [anyway]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGTERM to a handler")
def test_a_signal_ends_a_run_with_its_code_and_says_how_to_go_on(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    metrics, config = tmp_path / "output" / "metrics.jsonl", tmp_path / "output" / "config.toml"

    def stop_after_the_first_step() -> None:
        while not metrics.exists() or not metrics.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_the_first_step, daemon=True)
    watcher.start()
    done = run("train", *small_run, "--steps", "100000")
    watcher.join()
    assert done.code == 143
    assert f"Stopped. Go on with: tworeel train {config} --resume" in done.out
    assert list((tmp_path / "output" / "checkpoints").glob("step-*"))
