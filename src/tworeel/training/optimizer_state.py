"""The optimizer's state by parameter name: restored exactly, also where the model is split otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tworeel.training.manifest import CheckpointError

_AS_BUILT = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""How a step is computed, which belongs to the devices of this run and not to the saved one."""


def optimizer_tensors(optimizer: Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the state of an optimizer apart: AdamW's moments, or what bitsandbytes' 8-bit AdamW keeps.

    Args:
        optimizer: Any whose state of a parameter is a flat dict of tensors and plain numbers.
        names: Of its parameters, in the order of its groups.

    Returns:
        Tensors by `<parameter>.<entry>`, still where the optimizer has them, and plain JSON for the rest.
    """
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter, group in _named(optimizer, names):
        entries = optimizer.state.get(parameter, {})
        tensors |= {f"{name}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
        parameters[name] = {
            "shape": list(parameter.shape),
            "numbers": {key: value for key, value in entries.items() if not isinstance(value, Tensor)},
            "options": {key: _as_json(value) for key, value in group.items() if key not in _AS_BUILT},
        }
    return tensors, {"kind": type(optimizer).__name__, "parameters": parameters}


def restore_optimizer(
    optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took, bit by bit; each tensor goes to its parameter's device.

    Groups may be cut otherwise than when saved, as long as each has parameters with the same options.

    Raises:
        CheckpointError: The optimizer is of another kind, or its parameters have other names or shapes;
            the optimizer is then unchanged.
    """
    named = list(_named(optimizer, names))
    saved = state["parameters"]
    _check_fit(optimizer, named, state)
    entries: dict[str, dict[str, Any]] = {name: dict(saved[name]["numbers"]) for name in names}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        entries[name][key] = tensor
    for name, parameter, group in named:
        for key, value in saved[name]["options"].items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        placed = {key: _placed(key, value, parameter, group) for key, value in entries[name].items()}
        optimizer.state.pop(parameter, None)
        if placed:  # a parameter that never had a gradient has none, and an empty one confuses AdamW
            optimizer.state[parameter] = placed


def _named(optimizer: Optimizer, names: Sequence[str]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    members = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(set(names)) == len(names) == len(members), (len(names), len(members))
    return ((name, parameter, group) for name, (parameter, group) in zip(names, members, strict=True))


def _check_fit(
    optimizer: Optimizer, named: Sequence[tuple[str, Tensor, dict[str, Any]]], state: Mapping[str, Any]
) -> None:
    kind, saved = type(optimizer).__name__, state["parameters"]
    problems = []
    if kind != state["kind"]:
        problems.append(f"the checkpoint has the state of {state['kind']}, this run uses {kind}")
    ours = {name: list(parameter.shape) for name, parameter, _ in named}
    problems += [f"parameter {name} is not in the checkpoint" for name in ours if name not in saved]
    problems += [f"parameter {name} is only in the checkpoint" for name in saved if name not in ours]
    problems += [
        f"parameter {name} has shape {shape}, in the checkpoint {saved[name]['shape']}"
        for name, shape in ours.items()
        if name in saved and shape != saved[name]["shape"]
    ]
    if problems:
        raise CheckpointError(*problems)
    _check_groups_agree(optimizer, {id(p): saved[name]["options"] for name, p, _ in named})


def _check_groups_agree(optimizer: Optimizer, options: Mapping[int, Any]) -> None:
    for number, group in enumerate(optimizer.param_groups):
        first, *others = (options[id(parameter)] for parameter in group["params"])
        if any(other != first for other in others):
            raise CheckpointError(f"parameter group {number} joins parameters saved with different options")


def _placed(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """A copy on the parameter's device; torch counts steps on the CPU unless its kernel reads the count."""
    if not isinstance(value, Tensor):
        return value
    on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.to(torch.device("cpu") if on_cpu else parameter.device, copy=True)


def _as_json(value: Any) -> Any:
    assert not isinstance(value, Tensor), "a learning rate kept as a tensor is not saved exactly"
    return list(value) if isinstance(value, tuple) else value
