"""One file of tensors, `.safetensors` or torch's `.pth`: its header, and one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tworeel.errors import UserError

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
_LFS_POINTER = b"version https://git-lfs"
_NESTINGS = ("model_state", "state_dict", "module", "model")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


RowRange = tuple[int, int]
"""Rows of a tensor: the first one, and the one behind the last."""


class Shard(Protocol):
    """One file that holds tensors."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def names(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header says beside its tensors."""
        ...

    def read(self, name: str, device: torch.device, rows: RowRange | None = None) -> Tensor:
        """Return the tensor, or some of its rows, on a device, in memory of its own."""
        ...

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        ...


def open_shard(path: Path) -> Shard:
    """Open a file by its ending.

    Raises:
        UserError: it is missing, empty, cut off, damaged or of another kind.
    """
    if path.suffix == ".safetensors":
        return _SafetensorsShard(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _PickledShard(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
    raise UserError(f"{path}: cannot read tensors from this kind of file; known are {known}")


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        header = _read_header(path)
        self.metadata = header.metadata
        by_offset = sorted(header.entries.items(), key=lambda item: item[1]["data_offsets"][0])
        self.names = {name: _info(path, name, entry) for name, entry in by_offset}
        self._ranges = {
            name: tuple(header.data_start + offset for offset in entry["data_offsets"])
            for name, entry in by_offset
        }

    def read(self, name: str, device: torch.device, rows: RowRange | None = None) -> Tensor:
        info, shape = self.names[name], self.names[name].shape
        start, end = self._ranges[name]
        if rows is not None:
            row = (end - start) // shape[0]
            start, end = start + rows[0] * row, start + rows[1] * row
            shape = (rows[1] - rows[0], *shape[1:])
        if start == end:
            return torch.empty(shape, dtype=info.dtype, device=device)
        # Only these bytes are mapped. safetensors' own reader maps the file as a whole, privately: the system
        # may count that as memory in use and refuse a file larger than its memory.
        before = start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            region = mmap.mmap(
                file.fileno(), end - start + before, access=mmap.ACCESS_COPY, offset=start - before
            )
        flat = torch.frombuffer(region, dtype=info.dtype, offset=before)
        return flat.reshape(shape).to(device, copy=True)

    def close(self) -> None:
        return


class _PickledShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._tensors: dict[str, Tensor] | None = None
        self.names = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._open().items()
        }
        self.close()

    def read(self, name: str, device: torch.device, rows: RowRange | None = None) -> Tensor:
        tensor = self._open()[name].detach()
        if rows is not None:
            tensor = tensor[rows[0] : rows[1]]
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._tensors = None

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = _unpickle(self.path)
        return self._tensors


def checked_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        UserError: the file is missing, empty, or a placeholder for one that was not downloaded.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: is empty (0 bytes); download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: is a Git LFS placeholder of {size} bytes; run `git lfs pull`")
    return size


@dataclass(frozen=True)
class _Header:
    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    data_start: int


def _read_header(path: Path) -> _Header:
    """Read a safetensors header: 8 bytes with its length, then JSON."""
    size = checked_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise UserError(f"{path}: not a safetensors file ({size} bytes)")
        if size < 8 + length:
            raise UserError(f"{path}: cut off: {size} bytes found, its header alone needs {8 + length}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        misfits = [name for name, entry in entries.items() if not _fits(entry)]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise UserError(f"{path}: damaged: its header of {length} bytes is not readable") from None
    if size != expected:
        raise UserError(f"{path}: cut off or damaged: {size} bytes found, {expected} expected")
    if misfits:
        raise UserError(f"{path}: damaged: the bytes of tensor '{misfits[0]}' do not fit its shape")
    return _Header(entries, metadata, 8 + length)


def _fits(entry: Mapping[str, Any]) -> bool:
    """Tell whether a tensor's bytes are as many as its shape needs; unknown dtypes are told of elsewhere."""
    start, end = entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    return 0 <= start <= end and (dtype is None or end - start == math.prod(entry["shape"]) * dtype.itemsize)


def _info(path: Path, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor '{name}' has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    return TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Map a `.pth` file's tensors; a file in torch's format from before 1.6 is read as a whole."""
    size = checked_size(path)
    try:
        # weights_only keeps a pickle from running code.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds something else than tensors, or is damaged ({size} bytes)") from None
    except RuntimeError as error:
        if "unable to mmap" in str(error):
            raise UserError(f"{path}: {size} bytes are more than this system lets a process map") from None
        raise UserError(f"{path}: cut off or damaged: {size} bytes found, its end is missing") from None
    except (EOFError, OSError, ValueError, KeyError, AttributeError):
        raise UserError(f"{path}: cut off or damaged: {size} bytes found, its end is missing") from None
    return _tensors_of(path, held)


def _tensors_of(path: Path, held: object) -> dict[str, Tensor]:
    """Return the tensors of an unpickled object, which may lie one level down."""
    if isinstance(held, dict):
        nested = [held[key] for key in _NESTINGS if isinstance(held.get(key), dict)]
        tensors = nested[0] if len(nested) == 1 else held
        strangers = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if tensors and not strangers:
            return dict(tensors)
        if strangers:
            raise UserError(f"{path}: holds something else than tensors, for example '{strangers[0]}'")
    raise UserError(f"{path}: holds no table of tensors")
