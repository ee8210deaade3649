from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tworeel.training import preflight

Run = Callable[..., Any]


def test_a_good_run_shows_the_model_the_buckets_and_the_cost(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    done = run("check", *small_run)
    assert done.code == 0, done.err
    assert "Model: wan2.1-t2v-1.3b" in done.out and "native layout" in done.out
    assert "tokens a clip" in done.out
    assert "3 clips of 3 files" in done.out
    assert "An optimizer step is 2 clips: 163 tokens on average, at most 200" in done.out
    assert "Stage 1: cpu" in done.out
    assert not list(tmp_path.iterdir())


def test_options_of_train_are_checked_too(run: Run, small_run: list[str]) -> None:
    done = run("check", *small_run, "--rank", "100000", "--steps", "-1")
    assert done.code == 2 and "train.steps = -1: must be" in done.err
    done = run("check", *small_run, "--rank", "100000", "--steps", "8")
    assert done.code == 2 and "lora.rank = 100000: at most" in done.err


def test_a_broken_clip_is_named_or_skipped(run: Run, small_run: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad" / "broken.mp4"
    bad.parent.mkdir()
    bad.write_bytes(b"no video")
    bad.with_suffix(".txt").write_text("A cat.", encoding="utf-8")
    done = run("check", *small_run, "--data", bad.parent)
    assert done.code == 2
    assert "tokens a clip" in done.out and "3 clips of 3 files" in done.out  # the good ones, all the same
    assert not (tmp_path / "output").exists()
    assert done.err.startswith(f"error: {bad}: ") and len(done.err.splitlines()) == 1

    skipped = run("check", *small_run, "--data", bad.parent, "--skip-broken")
    assert skipped.code == 0
    assert f"skipped: {bad}: " in skipped.err


def test_a_missing_model_and_a_missing_dataset_are_both_named(run: Run) -> None:
    done = run("check", "--model", "./nowhere", "--data", "no-clips", "--devices", "cpu")
    assert done.code == 2
    assert "nowhere" in done.err and "no-clips" in done.err and "Traceback" not in done.err


def test_a_file_where_the_run_or_the_cache_shall_be_is_told_and_nothing_is_made(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = run("check", *small_run, "--output", "file", "--set", "cache.folder=file/cache")
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {tmp_path / 'file'} is a file; a run needs a folder",
        f"error: {tmp_path / 'file' / 'cache'}: {tmp_path / 'file'} is a file; the cache needs a folder",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_train_would_refuse_to_write_beside_is_told(
    run: Run, small_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "lora.safetensors").touch()
    done = run("check", *small_run)
    assert done.code == 0
    assert "holds lora.safetensors: 'tworeel train' needs another --output" in done.out.replace("\n", " ")


def test_what_is_neither_a_clip_nor_a_caption_is_named(
    run: Run, small_run: list[str], clips: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(clips, mixed)
    for name in ("a.mpeg", "b.heic", "orphan.txt", ".hidden", *(f"{n}.json" for n in range(4))):
        (mixed / name).touch()
    done = run("check", *small_run, "--data", mixed)
    expected = "captions of clips: 0.json, 1.json, 2.json, 3.json, a.mpeg and 2 more"
    assert expected in " ".join(done.out.split())


def test_clips_of_files_that_are_too_slow_are_counted(run: Run, small_run: list[str]) -> None:
    done = run("check", *small_run, "--set", "data.frame_rate=32")
    assert (
        "2 clips with frames more than once: a file has fewer than 32 a second (data.frame_rate)" in done.out
    )
    assert "more than once" not in run("check", *small_run).out


def test_a_file_without_permission_is_one_line(
    run: Run, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "vae/config.json")

    monkeypatch.setattr(preflight, "survey", refused)
    done = run("check", *small_run)
    assert done.code == 2 and done.err == "error: vae/config.json: Permission denied\n"
