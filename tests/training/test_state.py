"""Which checkpoint a run goes on from, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Watcher
from torch import nn
from torch.optim import SGD, AdamW

from tworeel.config.schema import RunConfig
from tworeel.errors import UserError
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters, lora_state
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.manifest import CheckpointError
from tworeel.training.state import (
    find_checkpoint,
    leave_course,
    require_same_model,
    restore_state,
    save_state,
)

MakeConfig = Callable[..., RunConfig]


def make_toy(rank: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
    inject_lora(model, rank=rank, alpha=2.0, targets=["0", "1"])
    return model


def adamw(model: nn.Module) -> AdamW:
    return AdamW(lora_parameters(model).values(), lr=1e-2)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=4)


def fill(store: CheckpointStore, config: RunConfig, *steps: int, clips: str = "these") -> nn.Module:
    model = make_toy()
    optimizer = adamw(model)
    for step in steps:
        for k, parameter in enumerate(lora_parameters(model).values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + k))
        optimizer.step()
        save_state(store, step, model, optimizer, config=config, clips=clips, variant="wan2.1-t2v-1.3b")
    return model


def test_a_new_run_does_not_write_over_an_old_one(store: CheckpointStore, make_config: MakeConfig) -> None:
    config, watcher = make_config(), Watcher()
    assert find_checkpoint(store, False, config, watcher) is None
    fill(store, config, 2)
    with pytest.raises(UserError, match=r"holds a run with checkpoints; go on with --resume, or"):
        find_checkpoint(store, False, config, watcher)
    assert watcher.lines == []


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_run_without_checkpoints_has_left_is_not_written_over(
    store: CheckpointStore, make_config: MakeConfig, tmp_path: Path, resume: bool
) -> None:
    config, lora = make_config(), tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match=r"holds lora\.safetensors and no checkpoint to go on from; choose"):
        find_checkpoint(store, resume, config, Watcher(), [lora])
    fill(store, config, 2, 4)
    store.set_aside_after(0)
    with pytest.raises(
        UserError, match=r"set aside are left; go on with --resume-from \S+set-aside-step-0+4,"
    ):
        find_checkpoint(store, resume, config, Watcher(), [lora])


def test_a_resume_without_a_checkpoint_says_that_it_starts_anew(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    watcher = Watcher()
    assert find_checkpoint(store, True, make_config(), watcher) is None
    assert watcher.lines == ["there is no checkpoint yet: starting with step 1"]


def test_damaged_checkpoints_are_skipped_by_name(store: CheckpointStore, make_config: MakeConfig) -> None:
    config, watcher = make_config(), Watcher()
    fill(store, config, 1, 2, 3)
    damaged = store.folder / "step-00000003" / "lora.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    checkpoint = find_checkpoint(store, True, config, watcher)
    assert checkpoint is not None and checkpoint.step == 2
    assert watcher.lines[0].startswith(f"skipped a damaged checkpoint: {damaged}")
    assert watcher.lines[1] == f"resuming after step 2: {store.folder / 'step-00000002'}"


def test_an_explicit_checkpoint_that_is_damaged_is_an_error(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    config = make_config()
    fill(store, config, 1, 2)
    path = store.folder / "step-00000002"
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: missing"):
        find_checkpoint(store, path, config, Watcher())


def test_a_run_of_fewer_steps_than_it_has_is_refused(store: CheckpointStore, make_config: MakeConfig) -> None:
    fill(store, make_config(), 2, 4)
    short = make_config(train={"steps": 3})
    with pytest.raises(UserError, match=r"train\.steps = 3: .*step-00000004 has 4 steps already"):
        find_checkpoint(store, True, short, Watcher())
    earlier = find_checkpoint(store, store.folder / "step-00000002", short, Watcher())
    assert earlier is not None and earlier.step == 2


def test_options_that_change_the_course_are_named_and_no_others(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    fill(store, make_config(), 1)
    watcher = Watcher()
    changed = make_config(
        "elsewhere",
        train={"learning_rate": 0.5, "steps": 9, "save_every": 1, "seed": 3},
        engine={"devices": ("cpu",)},
    )
    find_checkpoint(store, True, changed, watcher)
    assert watcher.lines[:-1] == [
        "changed since the checkpoint: train.learning_rate: 0.001 -> 0.5",
        "changed since the checkpoint: train.seed: 0 -> 3",
    ]


@pytest.mark.parametrize(
    ("lora", "factor"),
    [({"alpha": 1.0}, "0.5"), ({"rslora": True}, "1.41421"), ({"rslora": True, "alpha": 4.0}, "2.82843")],
)
def test_another_scale_than_the_checkpoints_is_refused(
    store: CheckpointStore, make_config: MakeConfig, lora: dict[str, Any], factor: str
) -> None:
    fill(store, make_config(), 1)
    with pytest.raises(
        UserError, match=rf"^lora.alpha, lora.rslora: scale the LoRA by {factor}; .* with 1; leave"
    ):
        find_checkpoint(store, True, make_config(lora=lora), Watcher())
    assert find_checkpoint(store, True, make_config(lora={"alpha": 2.0}), Watcher()) is not None, "the same"


def test_another_optimizer_than_the_checkpoints_is_refused_before_anything_is_read(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    fill(store, make_config(), 1)
    other = make_config(train={"optimizer": "adamw8bit"})
    with pytest.raises(
        UserError, match=r'^train.optimizer = "adamw8bit": .* was trained with "adamw"; leave'
    ):
        find_checkpoint(store, True, other, Watcher())


def test_more_steps_are_a_change_where_the_learning_rate_follows_them(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    fill(store, make_config(train={"lr_schedule": "cosine"}), 1)
    watcher = Watcher()
    find_checkpoint(store, True, make_config(train={"lr_schedule": "cosine", "steps": 9}), watcher)
    assert watcher.lines[0] == (
        "changed since the checkpoint: train.steps: 4 -> 9: "
        "from here on the learning rate is that of a cosine schedule of so many"
    )


def test_another_lora_or_model_than_the_checkpoints_is_refused(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    config = make_config()
    fill(store, config, 1)
    other = config.model_copy(
        update={
            "model": config.model.model_copy(update={"expert": "low"}),
            "lora": config.lora.model_copy(update={"targets": "attention"}),
        }
    )
    with pytest.raises(UserError) as caught:
        find_checkpoint(store, True, other, Watcher())
    expert, targets = caught.value.problems
    assert expert.startswith('model.expert = "low": ') and "was trained with null; leave it" in expert
    assert targets.startswith('lora.targets = "attention": ') and 'was trained with "all-linear"' in targets
    checkpoint = find_checkpoint(store, True, config, Watcher())
    assert checkpoint is not None
    require_same_model(checkpoint, config, "wan2.1-t2v-1.3b")
    with pytest.raises(UserError, match=r"is wan2.2-t2v-a14b, and .* was trained with wan2.1-t2v-1.3b"):
        require_same_model(checkpoint, config, "wan2.2-t2v-a14b")


def test_later_checkpoints_are_set_aside_only_when_the_run_goes_on(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    config, watcher = make_config(), Watcher()
    fill(store, config, 1, 2, 3)
    checkpoint = find_checkpoint(store, store.folder / "step-00000001", config, watcher)
    assert checkpoint is not None
    assert store.steps() == [1, 2, 3], "a run that fails in its preflight has changed nothing"
    leave_course(store, checkpoint, "these", watcher)
    assert store.steps() == [1]
    assert sorted(path.name for path in store.folder.glob("set-aside-*")) == [
        "set-aside-step-00000002",
        "set-aside-step-00000003",
    ]
    assert sum("a later checkpoint was set aside" in line for line in watcher.lines) == 2


def test_changed_clips_are_told(store: CheckpointStore, make_config: MakeConfig) -> None:
    config, watcher = make_config(), Watcher()
    fill(store, config, 1)
    checkpoint = find_checkpoint(store, True, config, watcher)
    assert checkpoint is not None
    leave_course(store, checkpoint, "these", watcher)
    told = len(watcher.lines)
    leave_course(store, checkpoint, "others", watcher)
    assert watcher.lines[told:] == ["changed since the checkpoint: the clips, their captions or the encoders"]


def test_what_was_saved_comes_back_bit_by_bit(store: CheckpointStore, make_config: MakeConfig) -> None:
    model = fill(store, make_config(), 1, 2)
    fresh = make_toy()
    optimizer = adamw(fresh)
    checkpoint, _ = store.newest_intact()
    assert checkpoint is not None
    restore_state(checkpoint, fresh, optimizer)
    saved = lora_state(model)
    assert all(torch.equal(saved[name], value) for name, value in lora_state(fresh).items())
    assert len(optimizer.state) == len(saved)


def test_what_is_configured_of_the_optimizer_holds_and_not_what_was(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    fill(store, make_config(), 1)
    checkpoint, _ = store.newest_intact()
    assert checkpoint is not None
    model = make_toy()
    optimizer = AdamW(lora_parameters(model).values(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    restore_state(checkpoint, model, optimizer)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.1)


def test_a_checkpoint_of_another_lora_or_optimizer_is_refused(
    store: CheckpointStore, make_config: MakeConfig
) -> None:
    fill(store, make_config(), 1)
    checkpoint, _ = store.newest_intact()
    assert checkpoint is not None
    wider = make_toy(rank=3)
    with pytest.raises(UserError, match="lora_A"):
        restore_state(checkpoint, wider, adamw(wider))
    same = make_toy()
    with pytest.raises(CheckpointError, match="has the state of AdamW, this run uses SGD"):
        restore_state(checkpoint, same, SGD(lora_parameters(same).values(), lr=1.0))
