"""What a configuration leaves to the plan, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tworeel.config.schema import RunConfig


def stages_per_device(config: RunConfig) -> int:
    """Stages of each device; one where the plan has not decided yet."""
    number = config.engine.stages_per_device
    return 1 if number == "auto" else number


def settled(
    config: RunConfig, quantize: str | None = None, stages: int = 1, *, cpp_wrapper: bool = False
) -> RunConfig:
    """The configuration with nothing left open.

    Args:
        config: of a run.
        quantize: precision of the weights, if that was open.
        stages: of each device, if that was.
        cpp_wrapper: whether compiled blocks are launched from C++, if that was.
    """
    model, engine = config.model, config.engine
    if model.quantize == "auto":
        model = model.model_copy(update={"quantize": quantize})
    if engine.stages_per_device == "auto":
        engine = engine.model_copy(update={"stages_per_device": stages})
    if engine.cpp_wrapper == "auto":
        engine = engine.model_copy(update={"cpp_wrapper": cpp_wrapper})
    return config.model_copy(update={"model": model, "engine": engine})


def as_before(config: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The configuration of a resumed run: what it leaves open is what the run had.

    Args:
        config: of the resumed run.
        before: sections of the run that goes on, in which nothing is open. On other devices the number of
            stages and the way to launch stay open: the course of a training does not depend on them.
    """
    model, engine = config.model, config.engine
    if model.quantize == "auto":
        model = model.model_copy(update={"quantize": before["model"]["quantize"]})
    if engine.model_dump(mode="json")["devices"] == before["engine"]["devices"]:
        open_before = {
            name: before["engine"].get(name, "auto")
            for name in ("stages_per_device", "cpp_wrapper")
            if getattr(engine, name) == "auto"
        }
        engine = engine.model_copy(update=open_before)
    return config.model_copy(update={"model": model, "engine": engine})
