"""The tensors of one network over one or more files, read one at a time.

Opening looks at headers only. A damaged file is a `UserError` that names it and says how large it is and how
large it should be, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tworeel.errors import UserError, raise_if_any
from tworeel.weights.shards import PICKLE_SUFFIXES, RowRange, Shard, TensorInfo, checked_size, open_shard

__all__ = ["INDEX_SUFFIX", "PICKLE_SUFFIXES", "SUFFIXES", "RowRange", "TensorFiles", "TensorInfo"]

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIXES = (".safetensors", INDEX_SUFFIX, *PICKLE_SUFFIXES)

_CPU = torch.device("cpu")
_SAMPLES = 64
_SAMPLE_BYTES = 65536


class TensorFiles:
    """The tensors of one network, over one or more files.

    Args:
        paths: `.safetensors`, `.safetensors.index.json`, `.pth`, `.pt` or `.bin` files.

    Raises:
        UserError: a file is missing, empty, cut off, of another kind or holds something else than tensors,
            an index names a file or a tensor that is not there, or a name occurs twice.
    """

    def __init__(self, *paths: Path | str) -> None:
        assert paths, "no files"
        listed = {path: _listed_names(path) for path in map(Path, paths) if _is_index(path)}
        files = _unique(shard for path in map(Path, paths) for shard in _shard_paths(path, listed.get(path)))
        self._shards = _open_all(files)
        self._shard_of = _place_names(self._shards)
        self.names: Mapping[str, TensorInfo] = {
            name: shard.names[name] for name, shard in self._shard_of.items()
        }
        """Shape and dtype by name, in the order of the files."""
        self.metadata: Mapping[str, str] = {
            key: value for shard in self._shards for key, value in shard.metadata.items()
        }
        raise_if_any(_unkept_promises(listed, self.names))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors (an index is not among them)."""
        return tuple(shard.path for shard in self._shards)

    def __str__(self) -> str:
        first, *rest = self.paths
        return f"{first} (and {len(rest)} more)" if rest else str(first)

    def read(self, name: str, device: torch.device = _CPU, rows: Sequence[RowRange] | None = None) -> Tensor:
        """Read one tensor to a device, into memory of its own: nothing of the file stays mapped to it.

        It goes there from the page cache, without a copy in host memory.

        Args:
            name: of the tensor.
            device: where it goes.
            rows: ranges of its rows, which are put behind each other; only these are read. None reads all.
        """
        shard = self._shard_of[name]
        if rows is None:
            return shard.read(name, device)
        parts = [shard.read(name, device, part) for part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fingerprint(self) -> str:
        """Hash the content without reading all of it: size, header and evenly spaced samples of each file.

        File names do not count, so that a renamed or moved file stays the same.
        """
        digests = sorted(_fingerprint(shard) for shard in self._shards)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def close(self) -> None:
        """Close every file; a later read opens it again."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_index(path: Path | str) -> bool:
    return str(path).endswith(INDEX_SUFFIX)


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _listed_names(index: Path) -> dict[str, str]:
    """Return an index's map from tensor names to the names of their files."""
    checked_size(index)
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index}: not a readable safetensors index ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index}: its weight_map is not a table of tensor names and file names")
    return names


def _shard_paths(path: Path, listed: Mapping[str, str] | None) -> list[Path]:
    if listed is None:
        return [path]
    shards = _unique(path.parent / name for name in listed.values())
    raise_if_any(f"{shard}: missing, but {path.name} lists it" for shard in shards if not shard.is_file())
    return shards


def _open_all(paths: Iterable[Path]) -> list[Shard]:
    """Open every file; the problems of all of them are raised together."""
    shards: list[Shard] = []
    problems: list[str] = []
    for path in paths:
        try:
            shards.append(open_shard(path))
        except UserError as error:
            problems.extend(error.problems)
    raise_if_any(problems)
    return shards


def _place_names(shards: Iterable[Shard]) -> dict[str, Shard]:
    places: dict[str, Shard] = {}
    problems: list[str] = []
    for shard in shards:
        for name in shard.names:
            if name in places:
                problems.append(f"{shard.path}: tensor '{name}' is also in {places[name].path.name}")
            places[name] = shard
    raise_if_any(problems[:10])
    return places


def _unkept_promises(
    listed: Mapping[Path, Mapping[str, str]], names: Mapping[str, TensorInfo]
) -> Iterable[str]:
    for index, promised in listed.items():
        absent = [name for name in promised if name not in names]
        if absent:
            yield f"{index}: lists {len(absent)} tensors that are in none of its files, such as '{absent[0]}'"


def _fingerprint(shard: Shard) -> str:
    size = shard.path.stat().st_size
    digest = hashlib.sha256(f"{size} {sorted(map(repr, shard.names.items()))}".encode())
    last = max(size - _SAMPLE_BYTES, 0)
    offsets = {last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}
    with shard.path.open("rb") as file:
        for offset in sorted(offsets):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
