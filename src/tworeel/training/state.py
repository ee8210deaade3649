"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tworeel.config.schema import RunConfig
from tworeel.errors import UserError, raise_if_any
from tworeel.lora.state import load_lora_state, lora_parameters, lora_state
from tworeel.training.checkpoint import Checkpoint, CheckpointStore
from tworeel.training.choices import as_before
from tworeel.training.optimizer_state import optimizer_tensors, restore_optimizer
from tworeel.training.report import RunObserver

_GROUPS = ("lora", "optimizer")
_CONFIGURED = ("betas", "weight_decay")
"""Options of the optimizer that a resumed run may change; the learning rate is set at each step."""
_FREE_TO_CHANGE = {
    "engine": None,
    "cache": None,
    "sample": None,
    "train": {"output", "name", "steps", "save_every", "keep_checkpoints", "export_every", "tensorboard"},
}
"""Options that may differ on resume without changing the course of the training."""
_FIXED = {"model": ("expert",), "lora": ("rank", "dora", "targets"), "train": ("optimizer",)}
"""Options that may not."""
_LEAVE_IT = "leave it at that, or start a new run with another --output"


def save_state(
    store: CheckpointStore,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    config: RunConfig,
    clips: str,
    variant: str,
) -> Path:
    """Write a checkpoint after `step` steps. Noise and order need none: they follow from seed and step.

    Args:
        store: the run's checkpoints.
        step: optimizer steps done.
        model: with the LoRA.
        optimizer: of the LoRA.
        config: of the run.
        clips: what was trained on, as a hash (`MicroBatches.fingerprint`).
        variant: of the model, for example `wan2.2-t2v-a14b`.

    Raises:
        OutOfSpace: the disk is full; earlier checkpoints are intact.
    """
    tensors, settings = optimizer_tensors(optimizer, list(lora_parameters(model)))
    state = {
        "optimizer": settings,
        "config": config.model_dump(mode="json"),
        "clips": clips,
        "variant": variant,
    }
    return store.save(step, {"lora": lora_state(model), "optimizer": tensors}, state)


def restore_state(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's LoRA and optimizer back, bit by bit, on whatever devices the model is now.

    What the configuration says of the optimizer stays as the optimizer was made with.

    Raises:
        UserError: the checkpoint belongs to another LoRA or optimizer, or lacks a part; says what differs.
    """
    raise_if_any(
        f"{checkpoint.path}: holds no group '{group}'" for group in _GROUPS if group not in checkpoint.tensors
    )
    load_lora_state(model, checkpoint.tensors["lora"])
    names = list(lora_parameters(model))
    asked = [{key: group[key] for key in _CONFIGURED if key in group} for group in optimizer.param_groups]
    restore_optimizer(optimizer, names, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    for group, options in zip(optimizer.param_groups, asked, strict=True):
        group.update(options)


def find_checkpoint(
    store: CheckpointStore,
    resume: bool | Path,
    config: RunConfig,
    observer: RunObserver,
    results: Sequence[Path] = (),
) -> Checkpoint | None:
    """Find the checkpoint to go on from, and say what was skipped or has changed since.

    Args:
        store: the run's checkpoints.
        resume: False for a new run, True for the newest intact checkpoint, or the folder of one.
        config: of this run.
        observer: is told which checkpoint it is, and which were skipped.
        results: LoRAs that lie in the run's folder.

    Raises:
        UserError: a new run would write over an old one; no checkpoint is intact; it has more steps than
            the run shall have; or its LoRA has another rank or kind.
    """
    output = f"train.output = '{config.train.output}'"
    if resume is False:
        if store.steps():
            raise UserError(
                f"{output}: holds a run with checkpoints; go on with --resume, or choose another --output"
            )
        _refuse_to_begin(output, store, results)
        return None
    if isinstance(resume, Path):
        checkpoint = store.load(resume)
        skipped: list[str] = []
    else:
        found, skipped = store.newest_intact()
        if found is None:
            _refuse_to_begin(output, store, results)
            observer.say("there is no checkpoint yet: starting with step 1")
            return None
        checkpoint = found
    if checkpoint.step > config.train.steps:
        raise UserError(
            f"train.steps = {config.train.steps}: {checkpoint.path} has {checkpoint.step} steps already; "
            "ask for more steps, or resume from an earlier checkpoint"
        )
    raise_if_any(_unfit(checkpoint, config))
    before = checkpoint.state["config"]
    for line in skipped:
        observer.say(f"skipped a damaged checkpoint: {line}")
    for line in _changes(before, as_before(config, before).model_dump(mode="json")):
        observer.say(f"changed since the checkpoint: {line}")
    if config.train.lr_schedule != "constant" and before["train"]["steps"] != config.train.steps:
        observer.say(
            f"changed since the checkpoint: train.steps: {before['train']['steps']} -> {config.train.steps}: "
            f"from here on the learning rate is that of a {config.train.lr_schedule} schedule of so many"
        )
    observer.say(f"resuming after step {checkpoint.step}: {checkpoint.path}")
    return checkpoint


def _refuse_to_begin(output: str, store: CheckpointStore, results: Sequence[Path]) -> None:
    """Raise if a run that begins would write over what one without checkpoints has left."""
    if aside := store.set_aside():
        raise UserError(
            f"{output}: of its checkpoints only those that were set aside are left; "
            f"go on with --resume-from {aside[-1]}, or choose another --output"
        )
    if results:
        names = ", ".join(path.name for path in results)
        raise UserError(f"{output}: holds {names} and no checkpoint to go on from; choose another --output")


def leave_course(store: CheckpointStore, checkpoint: Checkpoint, clips: str, observer: RunObserver) -> None:
    """Before the first step of a resumed run: give up what an earlier course did later, and compare clips.

    Args:
        store: the run's checkpoints; those later than `checkpoint` are set aside.
        checkpoint: that the run goes on from.
        clips: what this run trains on, see `save_state`.
        observer: is told.
    """
    for moved in store.set_aside_after(checkpoint.step):
        observer.say(f"a later checkpoint was set aside: {moved}")
    if checkpoint.state["clips"] != clips:
        observer.say("changed since the checkpoint: the clips, their captions or the encoders")


def require_same_model(checkpoint: Checkpoint, config: RunConfig, variant: str) -> None:
    """Raise `UserError` unless a checkpoint is of this kind of model."""
    before = checkpoint.state.get("variant", variant)
    if before != variant:
        raise UserError(
            f"model.path = '{config.model.path}': is {variant}, and {checkpoint.path} was trained with "
            f"{before}; {_LEAVE_IT}"
        )


def _unfit(checkpoint: Checkpoint, config: RunConfig) -> Iterable[str]:
    """Options that make the LoRA another one than the checkpoint has: said before a model is read."""
    before, now = checkpoint.state["config"], config.model_dump(mode="json")
    for section, names in _FIXED.items():
        for name in names:
            then, asked = before[section][name], now[section][name]
            if then != asked:
                yield (
                    f"{section}.{name} = {json.dumps(asked)}: {checkpoint.path} was trained with "
                    f"{json.dumps(then)}; {_LEAVE_IT}"
                )
    scale, other = (_scale(config["lora"]) for config in (now, before))
    if scale != other and before["lora"]["rank"] == now["lora"]["rank"]:
        yield (
            f"lora.alpha, lora.rslora: scale the LoRA by {scale:g}; {checkpoint.path} was trained with "
            f"{other:g}; {_LEAVE_IT}"
        )


def _scale(lora: Mapping[str, Any]) -> float:
    """Of the update, by sections as they are written down."""
    rank = lora["rank"]
    return (lora["alpha"] or rank) / (sqrt(rank) if lora["rslora"] else rank)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options that make the resumed run differ from an undisturbed one."""
    changed = []
    for section, options in now.items():
        free = _FREE_TO_CHANGE.get(section, set())
        if free is None:
            continue
        old = before.get(section, {})
        changed += [
            f"{section}.{key}: {old.get(key)!r} -> {value!r}"
            for key, value in options.items()
            if key not in free and old.get(key) != value
        ]
    return changed
