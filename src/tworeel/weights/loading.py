"""Weights straight from their file to the device that needs them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tworeel.errors import raise_if_any
from tworeel.weights.rows import NameOf, Rows, rows_of
from tworeel.weights.scaled_fp8 import Dequantized
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

_LISTED = 10

_Places = dict[str, list[tuple[nn.Module, str]]]


class Origin(NamedTuple):
    """What fills a parameter: a tensor of the files, or some of its rows."""

    key: str
    rows: Rows

    def __str__(self) -> str:
        return f"'{self.key}'" if self.rows.is_whole else f"'{self.key}' (which holds '{self.rows.name}')"


@runtime_checkable
class Accepts(Protocol):
    """A module that takes its own tensors, to keep them in another form than the files do."""

    def accept(self, name: str, tensor: Tensor) -> None:
        """Take the tensor of one parameter or buffer, on its device."""


def load_weights(
    module: nn.Module,
    files: TensorFiles,
    name_of: NameOf,
    *,
    device_of: Callable[[str], torch.device],
    dtype_of: Callable[[str], torch.dtype],
    accepted_on: Callable[[str], torch.device] | None = None,
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
        name_of: a key in the files -> name in `module`, or the rows of what it becomes; None for keys to
            leave out.
        device_of: name in `module` -> device.
        dtype_of: name in `module` -> dtype of the loaded parameter.
        accepted_on: name in `module` -> device on which a module that accepts its tensors gets them; its
            parameters go to their own device then. The same by default.

    Raises:
        UserError: tensors are missing, unknown, given twice or of another shape; all are found from headers,
            before anything is read, and listed by name.
    """
    origins = check_weights(module, files, name_of)
    source, places = Dequantized(files), _places(module)
    with files:
        for name in _in_file_order(origins, source.names):
            key, rows = origins[name]
            ranges, home = rows.ranges(source.names[key].shape), device_of(name)
            accepted = any(isinstance(owner, Accepts) for owner, _ in places[name])
            first = accepted_on(name) if accepted_on is not None and accepted else home
            _put(places[name], source.read(key, dtype_of(name), first, ranges), home)
    _move_other_buffers(module, origins, device_of)


def check_weights(module: nn.Module, files: TensorFiles, name_of: NameOf) -> dict[str, Origin]:
    """Compare a module with the headers of its files; return what fills each parameter.

    Raises:
        UserError: as `load_weights`.
    """
    source = Dequantized(files)
    origins, twice = _origins(source.names, name_of)
    problems = [*twice, *_mismatches(module, source.names, origins, _places(module))]
    raise_if_any(f"{files}: {problem}" for problem in problems)
    return origins


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


def _origins(names: Mapping[str, TensorInfo], name_of: NameOf) -> tuple[dict[str, Origin], list[str]]:
    """Return what fills each parameter, and the problems of parameters that two keys would fill."""
    origins: dict[str, Origin] = {}
    problems: list[str] = []
    for key in names:
        for rows in rows_of(name_of(key)):
            if rows.name in origins:
                problems.append(f"'{key}' and '{origins[rows.name].key}' in the files are both '{rows.name}'")
            else:
                origins[rows.name] = Origin(key, rows)
    return origins, problems


def _mismatches(
    module: nn.Module, names: Mapping[str, TensorInfo], origins: Mapping[str, Origin], places: _Places
) -> list[str]:
    wanted = module.state_dict(keep_vars=True)
    filled = {id(places[name]) for name in origins if name in places}
    missing = [name for name in wanted if id(places[name]) not in filled]
    unknown = dict.fromkeys(origin.key for name, origin in origins.items() if name not in wanted)
    known = [(origins[name], tensor) for name, tensor in wanted.items() if name in origins]
    misshaped = [
        f"{origin} is {names[origin.key].shape}, the model has {tuple(tensor.shape)}"
        for origin, tensor in known
        if origin.rows.shape(names[origin.key].shape) != tuple(tensor.shape)
    ]
    integers = [
        f"{origin} ({names[origin.key].dtype})"
        for origin, tensor in known
        if names[origin.key].dtype.is_floating_point != tensor.is_floating_point()
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


def _in_file_order(origins: Mapping[str, Origin], names: Mapping[str, TensorInfo]) -> list[str]:
    """Return parameter names so that a disk reads forward."""
    order = {key: position for position, key in enumerate(names)}
    return sorted(origins, key=lambda name: (order[origins[name].key], origins[name].rows.parts))


def _put(places: list[tuple[nn.Module, str]], tensor: Tensor, home: torch.device) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for owner, leaf in places:
        if isinstance(owner, Accepts):
            owner.accept(leaf, tensor)
            if tensor.device != home:
                _bring_home(owner, home)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = parameter


def _bring_home(owner: nn.Module, home: torch.device) -> None:
    for name, kept in list(owner.named_parameters(recurse=False)):
        if not kept.is_meta:  # its other tensors may still have to come
            owner.register_parameter(name, nn.Parameter(kept.to(home), requires_grad=False))


def _move_other_buffers(
    module: nn.Module, filled: Mapping[str, Origin], device_of: Callable[[str], torch.device]
) -> None:
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if name not in filled:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(device_of(name))
