"""Rules that hold between options."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tworeel.config.fields import all_options
from tworeel.config.writing import toml_value


@dataclass(frozen=True)
class _Rule:
    keys: tuple[str, ...]
    is_kept: Callable[..., bool]
    """Takes the values of the keys; is not asked while one of them is None."""
    demand: str


_RULES = (
    _Rule(
        ("data.min_aspect", "data.max_aspect"),
        lambda low, high: low <= high,
        "min_aspect must not exceed max_aspect",
    ),
    _Rule(
        ("train.warmup_steps", "train.steps"),
        lambda warmup, steps: warmup <= steps,
        "warmup_steps must not exceed steps",
    ),
    _Rule(
        ("engine.split_at",),
        lambda blocks: all(first < second for first, second in pairwise(blocks)),
        "block numbers must increase",
    ),
    _Rule(
        ("engine.split_at", "engine.devices", "engine.stages_per_device"),
        lambda blocks, devices, each: each == "auto" or len(blocks) == len(devices) * each - 1,
        "split_at must have one number less than there are stages",
    ),
    _Rule(
        ("engine.split_at", "engine.stages_per_device"),
        lambda blocks, each: each != "auto",
        "split_at needs a number of stages",
    ),
    _Rule(
        ("engine.streamed_blocks", "engine.stages_per_device"),
        lambda counts, each: each != "auto",
        "streamed_blocks needs a number of stages",
    ),
    _Rule(
        ("engine.streamed_blocks", "engine.residency"),
        lambda counts, residency: not any(counts) or residency != "keep",
        "blocks whose weights are streamed cannot keep their activations",
    ),
    _Rule(
        ("engine.cpp_wrapper", "engine.compile"),
        lambda cpp_wrapper, compile: compile or cpp_wrapper is not True,
        "what is not compiled cannot be launched from C++",
    ),
    _Rule(
        ("model.quantize", "model.dtype"),
        lambda kind, dtype: dtype != "float64",
        "quantized models compute in bfloat16 or float32",
    ),
)


def broken_rules(tree: Mapping[str, Any], wrong: Container[str]) -> Iterator[str]:
    """Yield a line for each rule that the values break.

    Args:
        tree: the sections as they were read; options that are not there have their defaults.
        wrong: keys whose values are no good by themselves; rules on them are left out.
    """
    defaults = {option.key: option.default for option in all_options()}
    for rule in _RULES:
        if any(key in wrong or key.partition(".")[0] in wrong for key in rule.keys):
            continue
        values = [_value(tree, key, defaults[key]) for key in rule.keys]
        if None not in values and not rule.is_kept(*values):
            pairs = zip(rule.keys, map(toml_value, values), strict=True)
            yield ", ".join(f"{key} = {value}" for key, value in pairs) + f": {rule.demand}"


def _value(tree: Mapping[str, Any], key: str, default: Any) -> Any:
    section, _, name = key.partition(".")
    return tree.get(section, {}).get(name, default)
