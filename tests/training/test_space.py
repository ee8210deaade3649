"""Free space, on real disks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tworeel.errors import UserError
from tworeel.training.space import (
    OutOfSpace,
    free_space,
    full_disk_as_user_error,
    require_space,
    space_of_results,
    write_errors_in_words,
)


def test_room_that_is_there_is_enough(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "made", 1, "a checkpoint")


def test_too_little_room_is_told_with_folder_needed_and_free(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    with pytest.raises(
        UserError, match=r"yet: a checkpoint needs [\d.]+ GiB, but only [\d.]+ [GM]iB are free"
    ):
        require_space(folder, free_space(folder) * 2 + 10**9, "a checkpoint")
    assert not folder.exists()


def test_small_sizes_are_told_in_mebibytes(tiny_disk: Path) -> None:
    with pytest.raises(OutOfSpace, match=r"needs 3\.00 MiB, but only 1\.00 MiB are free"):
        require_space(tiny_disk, 3 * 1024**2, "a LoRA")


def test_a_disk_that_fills_up_is_told_with_what_is_kept(tiny_disk: Path) -> None:
    path = tiny_disk / "big"
    message = "big: the disk filled up while a LoRA was written; the old one is kept"
    guard = full_disk_as_user_error(path, "a LoRA", "the old one is kept")
    with pytest.raises(OutOfSpace, match=message), guard:
        path.write_bytes(bytes(2 * 1024**2))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, full_disk_as_user_error(tmp_path, "x", "y"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.errno == errno.ENOENT


def test_whatever_the_system_refuses_to_write_is_told_with_what_is_kept(tmp_path: Path) -> None:
    guard = write_errors_in_words(tmp_path, "a LoRA", "the old one is kept")
    with (
        pytest.raises(UserError, match="a LoRA could not be written: File too large; the old one is kept"),
        guard,
    ):
        raise OSError(errno.EFBIG, "File too large")


def test_one_checkpoint_more_than_is_kept_needs_room(tmp_path: Path) -> None:
    assert space_of_results(10, 2, tmp_path / "none") == 3 * 30 + 10


def test_a_run_that_goes_on_has_the_room_of_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "lora.safetensors").write_bytes(bytes(25))
    assert space_of_results(10, 2, tmp_path) == 3 * 30 + 10 - 25
    (tmp_path / "set-aside-step-9").mkdir()
    (tmp_path / "set-aside-step-9" / "lora.safetensors").write_bytes(bytes(1000))
    assert space_of_results(10, 2, tmp_path) == 3 * 30 + 10 - 25, "what is set aside is not removed"
    (tmp_path / "step-1" / "more").write_bytes(bytes(1000))
    assert space_of_results(10, 2, tmp_path) == 30 + 10, "one is written before the oldest goes"
