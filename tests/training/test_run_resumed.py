"""A resumed run is the run that was never interrupted, bit by bit (R2, R3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Watcher, digest_of, lora_of, losses_of, tiny_config
from torch import Tensor

from tworeel.config.schema import ModelConfig, RunConfig, SourceConfig
from tworeel.errors import UserError
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.run import train

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]
SPLITS = {
    1: {"devices": ("cpu",)},
    2: {"devices": ("cpu",) * 2, "split_at": (3,)},
    4: {"devices": ("cpu",) * 4, "residency": "offload"},
}
STEPS = 6
# Constant, so that a run that is asked for fewer steps takes the same course.
COURSE: dict[str, Any] = {"save_every": 1, "keep_checkpoints": 10, "warmup_steps": 2, "weight_decay": 0.1}


def store_of(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(config.train.output / "checkpoints", keep=10)


@pytest.fixture(scope="module")
def straight(make_model: MakeModel, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of six steps in one go."""
    output = tmp_path_factory.mktemp("straight")
    config = tiny_config(make_model(), clips, output, train={"steps": STEPS, **COURSE})
    train(config)
    return digest_of(config)


def test_two_runs_of_one_configuration_are_bitwise_equal(make_config: MakeConfig, straight: str) -> None:
    again = make_config("again", train={"steps": STEPS, **COURSE})
    torch.manual_seed(1234)  # the global generator has no part in it
    train(again)
    assert digest_of(again) == straight
    assert len(losses_of(again)) == STEPS


@pytest.mark.parametrize("first", SPLITS)
@pytest.mark.parametrize("then", SPLITS)
def test_a_resume_under_another_split_is_exact(
    make_config: MakeConfig, straight: str, first: int, then: int
) -> None:
    train(make_config(train={"steps": 3, **COURSE}, engine=SPLITS[first]))
    resumed = make_config(train={"steps": STEPS, **COURSE}, engine=SPLITS[then])
    train(resumed, resume=True)
    assert digest_of(resumed) == straight


def test_a_resume_of_a_resume_is_exact(make_config: MakeConfig, straight: str) -> None:
    for number, steps in enumerate((1, 2, 3, 5, STEPS)):
        config = make_config(train={"steps": steps, **COURSE}, engine=SPLITS[(1, 2, 4)[number % 3]])
        train(config, resume=number > 0)
    assert digest_of(config) == straight


def test_going_back_to_an_earlier_checkpoint_is_exact_and_keeps_the_later_ones(
    make_config: MakeConfig, straight: str
) -> None:
    config = make_config(train={"steps": STEPS, **COURSE})
    train(make_config(train={"steps": 5, **COURSE}))
    watcher = Watcher()
    train(config, resume=store_of(config).folder / "step-00000002", observer=watcher)
    assert digest_of(config) == straight
    assert sum("a later checkpoint was set aside" in line for line in watcher.lines) == 3
    assert len(list(store_of(config).folder.glob("set-aside-*"))) == 3


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    make_config: MakeConfig, straight: str
) -> None:
    config = make_config(train={"steps": STEPS, **COURSE})
    train(make_config(train={"steps": 4, **COURSE}))
    damaged = store_of(config).folder / "step-00000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    watcher = Watcher()
    train(config, resume=True, observer=watcher)
    assert watcher.lines[0].startswith(f"skipped a damaged checkpoint: {damaged}")
    assert watcher.steps[0].step == 4
    assert digest_of(config) == straight


def zeroed(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """As a fresh LoRA or optimizer has them."""
    found = {name: torch.zeros_like(t) if name.endswith(ending) else t for name, t in tensors.items()}
    assert any(name.endswith(ending) for name in tensors), ending
    return found


PIECES = ("lora", "first moments", "second moments", "update count", "step")


@pytest.mark.parametrize("forgotten", [None, *PIECES])
def test_no_piece_of_the_state_can_be_forgotten(
    make_config: MakeConfig, straight: str, forgotten: str | None
) -> None:
    whole = make_config("whole", train={"steps": 3, **COURSE})
    train(whole)
    saved = store_of(whole).load(store_of(whole).folder / "step-00000003")
    lora, optimizer, step = saved.tensors["lora"], saved.tensors["optimizer"], saved.step
    if forgotten == "lora":
        lora = zeroed(lora, "lora_B")
    elif forgotten == "first moments":
        optimizer = zeroed(optimizer, ".exp_avg")
    elif forgotten == "second moments":
        optimizer = zeroed(optimizer, ".exp_avg_sq")
    elif forgotten == "update count":
        optimizer = zeroed(optimizer, ".step")
    elif forgotten == "step":
        step -= 1
    resumed = make_config("resumed", train={"steps": STEPS, **COURSE})
    store_of(resumed).save(step, {"lora": lora, "optimizer": optimizer}, saved.state)
    train(resumed, resume=True)
    same = without_losses(digest_of(resumed)) == without_losses(straight)
    assert same is (forgotten is None)


def without_losses(digest: str) -> list[Any]:
    """The resumed run's log has none from before its checkpoint."""
    whole: list[Any] = json.loads(digest)
    return whole[:-1]


@pytest.mark.parametrize("group", ["lora", "optimizer"])
def test_a_missing_group_of_the_state_is_an_error(make_config: MakeConfig, group: str) -> None:
    config = make_config(train={"steps": 2, **COURSE})
    train(config)
    saved = store_of(config).load(store_of(config).folder / "step-00000002")
    tensors = {name: part for name, part in saved.tensors.items() if name != group}
    store_of(config).save(3, tensors, saved.state)
    with pytest.raises(UserError, match=group):
        train(make_config(train={"steps": 4, **COURSE}), resume=True)


def test_a_finished_run_that_is_resumed_writes_its_lora_again(make_config: MakeConfig, straight: str) -> None:
    config = make_config(train={"steps": STEPS, **COURSE})
    train(config)
    (config.train.output / "lora.safetensors").unlink()
    watcher = Watcher()
    train(config, resume=True, observer=watcher)
    assert watcher.steps == []
    assert digest_of(config) == straight


def test_a_run_that_is_asked_for_fewer_steps_than_it_has_is_refused(make_config: MakeConfig) -> None:
    train(make_config(train={"steps": 4, **COURSE}))
    with pytest.raises(UserError, match=r"train\.steps = 2: .* has 4 steps already"):
        train(make_config(train={"steps": 2, **COURSE}), resume=True)


def test_a_new_run_into_the_folder_of_an_old_one_is_refused_and_changes_nothing(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    train(config)
    before = {path: path.read_bytes() for path in files_of(config)}
    with pytest.raises(UserError, match="holds a run with checkpoints"):
        train(make_config(train={"learning_rate": 0.5}))
    assert {path: path.read_bytes() for path in files_of(config)} == before


def files_of(config: RunConfig) -> list[Path]:
    return sorted(path for path in config.train.output.rglob("*") if path.is_file())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_rate_goes_on_where_it_was(make_config: MakeConfig, schedule: str) -> None:
    course = {**COURSE, "steps": 5, "lr_schedule": schedule}
    whole = make_config("whole", train=course)
    train(whole)
    resumed = make_config("resumed", train=course)
    checkpoint = store_of(whole).load(store_of(whole).folder / "step-00000002")
    store_of(resumed).save(2, checkpoint.tensors, checkpoint.state)
    train(resumed, resume=True)
    assert all(torch.equal(lora_of(whole)[name], value) for name, value in lora_of(resumed).items())
    assert losses_of(resumed) == losses_of(whole)[2:]


def test_changed_captions_are_told_on_resume(make_config: MakeConfig, clips: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(clips, own)
    data = {"sources": (SourceConfig(path=own),)}
    train(make_config(train={"steps": 2, **COURSE}, data=data))
    (own / "clip_0.txt").write_text("something else", encoding="utf-8")
    watcher = Watcher()
    train(make_config(train={"steps": 3, **COURSE}, data=data), resume=True, observer=watcher)
    assert "changed since the checkpoint: the clips, their captions or the encoders" in watcher.lines
