"""Checkpoints under kills, damage and a full disk: nothing is lost, nothing damaged is loaded."""

from __future__ import annotations

import math
import random
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from run_in_process import process_context
from torch import Tensor

from tworeel.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from tworeel.training.manifest import MANIFEST
from tworeel.training.space import OutOfSpace, free_space

KILLS = 60
DAMAGES = 200


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    weight = torch.arange(step, step + 600, dtype=torch.float32).reshape(20, 30).sin()
    return {
        "lora": {"a.weight": weight, "b.weight": weight.T.bfloat16()},
        "optimizer": {"a.weight.step": torch.tensor(float(step)), "a.weight.exp_avg": weight / 3},
    }


def state_of(step: int) -> dict[str, Any]:
    return {"epoch": step // 7, "loss": 1 / (step + 3), "order": [step, step + 1], "none": None, "flag": True}


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, tensors_of(step), state_of(step))


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None and checkpoint.step == step and checkpoint.state == state_of(step)
    wanted = tensors_of(step)
    assert checkpoint.tensors.keys() == wanted.keys()
    for group, tensors in wanted.items():
        assert checkpoint.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            loaded = checkpoint.tensors[group][name]
            assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_was_saved_comes_back_bit_by_bit(store: CheckpointStore) -> None:
    path = save(store, 10)
    assert path.name == "step-00000010"
    assert names(path) == ["lora.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]
    assert_is(store.load(path), 10)


def test_without_checkpoints_there_is_nothing_to_resume(store: CheckpointStore) -> None:
    assert store.newest_intact() == (None, [])


def test_the_newest_are_kept_and_the_newest_is_resumed(store: CheckpointStore) -> None:
    for step in (5, 100, 20, 123_456_789):
        save(store, step)
    assert store.steps() == [20, 123_456_789]
    checkpoint, skipped = store.newest_intact()
    assert_is(checkpoint, 123_456_789)
    assert skipped == []


def test_fewer_than_two_are_never_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        CheckpointStore(tmp_path, keep=1)


def test_numbers_in_the_state_are_exact(store: CheckpointStore) -> None:
    floats = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3]
    state = {"floats": floats, "big": 2**200, "one": 1, "one_float": 1.0}
    loaded = store.load(store.save(1, {}, state)).state
    assert [value.hex() for value in loaded["floats"]] == [value.hex() for value in floats]
    assert loaded["big"] == 2**200
    assert (type(loaded["one"]), type(loaded["one_float"])) == (int, float)


@pytest.mark.parametrize("value", [math.nan, math.inf, (1, 2), {3: 4}])
def test_a_state_that_would_change_is_refused_before_anything_is_written(
    store: CheckpointStore, value: object
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(1, tensors_of(1), {"value": value})
    assert not store.folder.exists()


def test_tensors_that_share_memory_and_empty_groups_are_saved(store: CheckpointStore) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    group = {"whole": table, "row": table[1], "turned": table.T, "none": torch.empty(0, 4)}
    loaded = store.load(store.save(1, {"lora": group, "optimizer": {}}, {})).tensors
    assert loaded["optimizer"] == {}
    assert all(torch.equal(loaded["lora"][name], tensor) for name, tensor in group.items())


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    save(store, 10)
    store.save(10, {}, {"second": True})
    assert store.load(store.folder / "step-00000010").state == {"second": True}
    assert names(store.folder) == ["step-00000010"]


def test_a_save_that_fails_midway_keeps_the_checkpoint_of_the_same_step(store: CheckpointStore) -> None:
    save(store, 10)
    without_data = {"lora": {"a": torch.ones(3, device="meta")}}
    with pytest.raises(NotImplementedError, match="meta"):
        store.save(10, without_data, {})
    assert names(store.folder) == ["step-00000010"]
    assert_is(store.newest_intact()[0], 10)


def test_a_replacement_that_was_cut_short_loses_nothing(store: CheckpointStore) -> None:
    """The moment between the two renames, when the step has no folder under its own name."""
    path = save(store, 10)
    path.rename(path.with_name(".replaced-step-00000010"))
    assert_is(store.newest_intact()[0], 10)
    save(store, 20)
    assert names(store.folder) == ["step-00000010", "step-00000020"]
    shutil.copytree(path, path.with_name(".replaced-step-00000010"))
    save(store, 30)
    assert names(store.folder) == ["step-00000020", "step-00000030"]


def test_leftovers_of_a_killed_process_are_neither_resumed_nor_kept(store: CheckpointStore) -> None:
    path = save(store, 10)
    for name in (".tmp-step-00000020", ".tmp-delete-step-00000005"):
        shutil.copytree(path, path.with_name(name))
    assert store.steps() == [10]
    save(store, 20)
    assert names(store.folder) == ["step-00000010", "step-00000020"]


def test_going_back_sets_later_checkpoints_aside_and_deletes_none(store: CheckpointStore) -> None:
    for step in (10, 20):
        save(store, step)
    for _ in range(2):
        assert_is(store.load(store.folder / "step-00000010"), 10)
        store.set_aside_after(10)
        assert_is(store.newest_intact()[0], 10)
        save(store, 20)
    assert store.steps() == [10, 20]
    assert names(store.folder)[:2] == ["set-aside-step-00000020", "set-aside-step-00000020-2"]


def test_saving_an_earlier_step_is_not_undone_by_what_lies_later(store: CheckpointStore) -> None:
    for step in (20, 30, 15):
        save(store, step)
    assert_is(store.newest_intact()[0], 15)


def test_every_kind_of_damage_is_told_with_file_and_reason(store: CheckpointStore) -> None:
    path = save(store, 10)
    lora, state = path / "lora.safetensors", path / "state.json"
    lora.write_bytes(lora.read_bytes()[:-1])
    state.unlink()
    (path / "more.txt").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        store.load(path)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert f"{state}: missing" in told and f"{path / 'more.txt'}: not in the manifest" in told
    assert f"{lora}: damaged (" in told and "the manifest says" in told


def test_a_renamed_checkpoint_is_not_taken_for_another_step(store: CheckpointStore) -> None:
    path = save(store, 10)
    with pytest.raises(CheckpointError, match="holds step 10; was it renamed"):
        store.load(path.rename(path.with_name("step-00000099")))
    kept = (store.folder / "step-00000099").rename(store.folder / "my best one")
    assert_is(store.load(kept), 10)


def test_a_folder_that_is_no_checkpoint_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        store.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint: there is no manifest"):
        store.load(tmp_path)


def test_a_checkpoint_of_a_later_format_is_refused(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr("tworeel.training.manifest.FORMAT", 2)
        path = save(store, 10)
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        store.load(path)


def test_if_no_checkpoint_is_intact_the_run_does_not_start_over(store: CheckpointStore) -> None:
    for step in (10, 20):
        (save(store, step) / MANIFEST).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is intact") as caught:
        store.newest_intact()
    assert len(caught.value.problems) == 3


def damage(path: Path, other: Path, chance: random.Random) -> str:
    """Do one thing that disks, tools and people do to a checkpoint; return what."""
    file = chance.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    kind = chance.choice(["truncate", "zero", "flip", "swap", "delete", "append", "empty folder"])
    if kind == "empty folder":
        shutil.rmtree(path)
        path.mkdir()
    elif kind == "swap":
        file.write_bytes((other / file.name).read_bytes())
    elif kind == "delete":
        file.unlink()
    else:
        place = chance.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif kind == "zero":
            data[place : place + 4096] = bytes(len(data[place : place + 4096]))
        elif kind == "truncate":
            del data[place:]
        else:
            data += b"\n"
        file.write_bytes(data)
    return f"{kind} {file.name}"


def test_damaged_checkpoints_are_all_found_and_the_one_before_is_used(store: CheckpointStore) -> None:
    chance = random.Random(1)
    older, newer = save(store, 10), save(store, 20)
    whole = {file.name: file.read_bytes() for file in newer.iterdir()}
    done = 0
    while done < DAMAGES:
        what = damage(newer, older, chance)
        changed = {file.name: file.read_bytes() for file in newer.iterdir()} != whole
        if changed:  # zeros may hit zeros
            with pytest.raises(CheckpointError):
                store.load(newer)
            checkpoint, skipped = store.newest_intact()
            assert_is(checkpoint, 10)
            assert skipped and all(str(newer) in line for line in skipped), what
            done += 1
        shutil.rmtree(newer)
        newer.mkdir()
        for name, data in whole.items():
            (newer / name).write_bytes(data)


def test_too_little_room_is_told_before_anything_is_written(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tworeel.training.checkpoint._SLACK", 0)
    store = CheckpointStore(tiny_disk / "checkpoints")
    save(store, 10)
    with pytest.raises(OutOfSpace, match=r"checkpoint of step 20 needs 2\.00 MiB, but only 0\.\d+ MiB"):
        store.save(20, {"lora": {"a": torch.zeros(512, 1024)}}, {})
    assert_is(store.newest_intact()[0], 10)


@pytest.mark.parametrize("step", [10, 20])
def test_a_disk_that_fills_up_at_any_write_keeps_the_old_checkpoint(
    tiny_disk: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if another program took the room between the check and the write
    monkeypatch.setattr("tworeel.training.checkpoint.require_space", lambda *_: None)
    store, filler = CheckpointStore(tiny_disk / "checkpoints"), tiny_disk / "filler"
    save(store, 10)
    larger = {"lora": {"a": torch.ones(20, 1024)}, "optimizer": {"b": torch.ones(40, 1024)}}
    message = r"the disk filled up while the checkpoint was written; the earlier checkpoints are untouched"
    for pages in range(60):
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(free_space(tiny_disk) - 4096 * pages))
        with pytest.raises(OutOfSpace, match=message):
            store.save(step, larger, {"after": True})
        assert names(store.folder) == ["step-00000010"]
        assert_is(store.newest_intact()[0], 10)
    filler.unlink()
    assert store.load(store.save(step, larger, {"after": True})).state == {"after": True}


def save_for_ever(folder: str, first: int, told: Connection) -> None:
    store = CheckpointStore(Path(folder), keep=2)
    for step in range(first, sys.maxsize):
        save(store, step // 2)  # each step twice: the second replaces the first
        told.send(step // 2)


def kill_at_random(context: Any, store: CheckpointStore, first: int, delay: float) -> int | None:
    """Run a process that saves, kill it `delay` seconds after its first checkpoint; return its last one."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=save_for_ever, args=(str(store.folder), first, theirs), daemon=True)
    process.start()
    theirs.close()
    last = ours.recv()
    time.sleep(delay)
    process.kill()
    process.join()
    while ours.poll():
        try:
            last = ours.recv()
        except EOFError:
            break
    return last


def test_a_process_killed_at_any_moment_of_saving_loses_no_checkpoint(store: CheckpointStore) -> None:
    context, is_fast = process_context()
    chance = random.Random(2)
    step, leftovers = 0, 0
    for _ in range(KILLS if is_fast else KILLS // 10):
        last = kill_at_random(context, store, 2 * step, chance.uniform(0, 0.06))
        checkpoint, skipped = store.newest_intact()
        assert checkpoint is not None and checkpoint.step in (last, last + 1)
        assert_is(checkpoint, checkpoint.step)
        assert skipped == []
        leftovers += any(name.startswith(".") for name in names(store.folder))
        step = checkpoint.step
    assert leftovers > 0, "no kill fell into a save: the test proves nothing"
