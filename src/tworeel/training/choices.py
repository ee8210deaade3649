"""What a configuration leaves to the plan, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tworeel.config.schema import RunConfig


def stages_per_device(config: RunConfig) -> int:
    """Stages of each device; one where the plan has not decided yet."""
    number = config.engine.stages_per_device
    return 1 if number == "auto" else number


def settled(config: RunConfig, quantize: str | None = None, stages: int = 1) -> RunConfig:
    """The configuration with nothing left open.

    Args:
        config: of a run.
        quantize: precision of the weights, if that was open.
        stages: of each device, if that was.
    """
    model, engine = config.model, config.engine
    if model.quantize == "auto":
        model = model.model_copy(update={"quantize": quantize})
    if engine.stages_per_device == "auto":
        engine = engine.model_copy(update={"stages_per_device": stages})
    return config.model_copy(update={"model": model, "engine": engine})


def as_before(config: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The configuration of a resumed run: what it leaves open is what the run had.

    Args:
        config: of the resumed run.
        before: sections of the run that goes on, in which nothing is open. On other devices the number of
            stages stays open: the course of a training does not depend on it.
    """
    model, engine = config.model, config.engine
    if model.quantize == "auto":
        model = model.model_copy(update={"quantize": before["model"]["quantize"]})
    same_devices = engine.model_dump(mode="json")["devices"] == before["engine"]["devices"]
    if engine.stages_per_device == "auto" and same_devices:
        engine = engine.model_copy(update={"stages_per_device": before["engine"]["stages_per_device"]})
    return config.model_copy(update={"model": model, "engine": engine})
