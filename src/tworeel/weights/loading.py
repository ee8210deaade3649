"""Weights straight from their file to the device that needs them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tworeel.errors import raise_if_any
from tworeel.weights.scaled_fp8 import Dequantized
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

_LISTED = 10

_Places = dict[str, list[tuple[nn.Module, str]]]


@runtime_checkable
class Accepts(Protocol):
    """A module that takes its own tensors, to keep them in another form than the files do."""

    def accept(self, name: str, tensor: Tensor) -> None:
        """Take the tensor of one parameter or buffer, on its device."""


def load_weights(
    module: nn.Module,
    files: TensorFiles,
    name_of: Callable[[str], str | None],
    *,
    device_of: Callable[[str], torch.device],
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Fill a module that was built on the meta device; its parameters end frozen.

    Tensors go from the page cache to their device, where they take their dtype: host memory holds none of
    them, and no device more than one besides its own (and that one's fp32 copy while it is dequantized).
    Parameters that share one tensor keep sharing it, and any one of their names in the files is enough.
    Modules that accept tensors themselves (`Accepts`) are given theirs, one at a time too.
    Buffers that files do not hold (tables made by the constructor) move to their device as they are. The
    files are closed.

    Args:
        module: parameters on meta, buffers real.
        files: where the tensors are, possibly in `fp8_scaled` form.
        name_of: a key in the files -> name in `module`; None for keys to leave out.
        device_of: name in `module` -> device.
        dtype_of: name in `module` -> dtype of the loaded parameter.

    Raises:
        UserError: tensors are missing, unknown, given twice or of another shape; all are found from headers,
            before anything is read, and listed by name.
    """
    keys = check_weights(module, files, name_of)
    source, places = Dequantized(files), _places(module)
    with files:
        for name in _in_file_order(keys, source.names):
            _put(places[name], source.read(keys[name], dtype_of(name), device_of(name)))
    _move_other_buffers(module, keys, device_of)


def check_weights(
    module: nn.Module, files: TensorFiles, name_of: Callable[[str], str | None]
) -> dict[str, str]:
    """Compare a module with the headers of its files; return the key that fills each parameter.

    Raises:
        UserError: as `load_weights`.
    """
    source = Dequantized(files)
    keys, twice = _keys_by_name(source.names, name_of)
    problems = [*twice, *_mismatches(module, source.names, keys, _places(module))]
    raise_if_any(f"{files}: {problem}" for problem in problems)
    return keys


def _places(module: nn.Module) -> _Places:
    """Return where each tensor hangs, by name; names that share a tensor have all its places."""
    by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
    places: _Places = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        shared = by_identity.setdefault(id(tensor), [])
        shared.append((module.get_submodule(path), leaf))
        places[name] = shared
    return places


def _keys_by_name(
    names: Mapping[str, TensorInfo], name_of: Callable[[str], str | None]
) -> tuple[dict[str, str], list[str]]:
    """Return the key that fills each parameter, and the problems of parameters that two keys would fill."""
    keys: dict[str, str] = {}
    problems: list[str] = []
    for key in names:
        name = name_of(key)
        if name is not None and name in keys:
            problems.append(f"'{key}' and '{keys[name]}' in the files are both '{name}'")
        elif name is not None:
            keys[name] = key
    return keys, problems


def _mismatches(
    module: nn.Module, names: Mapping[str, TensorInfo], keys: Mapping[str, str], places: _Places
) -> list[str]:
    wanted = module.state_dict(keep_vars=True)
    filled = {id(places[name]) for name in keys if name in places}
    missing = [name for name in wanted if id(places[name]) not in filled]
    unknown = [key for name, key in keys.items() if name not in wanted]
    misshaped = [
        f"'{keys[name]}' is {names[keys[name]].shape}, the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in keys and names[keys[name]].shape != tuple(tensor.shape)
    ]
    integers = [
        f"'{keys[name]}' ({names[keys[name]].dtype})"
        for name, tensor in wanted.items()
        if name in keys and names[keys[name]].dtype.is_floating_point != tensor.is_floating_point()
    ]
    return [
        *_listing("missing from the files", [f"'{name}'" for name in missing]),
        *_listing("in the files but not in the model", [f"'{key}'" for key in unknown]),
        *_listing("of the wrong shape", misshaped),
        *_listing("of a kind of number that is not supported", integers),
    ]


def _listing(what: str, items: list[str]) -> Iterable[str]:
    if items:
        more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
        yield f"{len(items)} tensors {what}: {', '.join(items[:_LISTED])}{more}"


def _in_file_order(keys: Mapping[str, str], names: Mapping[str, TensorInfo]) -> list[str]:
    """Return parameter names so that a disk reads forward."""
    order = {key: position for position, key in enumerate(names)}
    return sorted(keys, key=lambda name: order[keys[name]])


def _put(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for owner, leaf in places:
        if isinstance(owner, Accepts):
            owner.accept(leaf, tensor)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = parameter


def _move_other_buffers(
    module: nn.Module, keys: Mapping[str, str], device_of: Callable[[str], torch.device]
) -> None:
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if name not in keys:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(device_of(name))
