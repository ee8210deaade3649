"""The files of one checkpoint and the manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tworeel.errors import UserError
from tworeel.files import fsync_file, fsync_folder

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS_SUFFIX = ".safetensors"


class CheckpointError(UserError):
    """A checkpoint is damaged, does not fit, or there is none to resume from."""


@dataclass(frozen=True)
class Entry:
    """What a file must be: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


def write_files(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    """Write all files of a checkpoint into the empty `folder` and wait until they are on the disk.

    Groups are turned into bytes one after the other: no more than one stands in memory twice.
    """
    entries = {STATE: _write(folder / STATE, state)}
    for group, tensors in groups.items():
        name = f"{group}{TENSORS_SUFFIX}"
        entries[name] = _write(folder / name, safetensors.torch.save(_unshared(tensors)))
    _write(folder / MANIFEST, _encode(step, entries))
    fsync_folder(folder)


def read_manifest(folder: Path) -> tuple[int, dict[str, Entry]]:
    """Return the step and the files that the manifest of a checkpoint names.

    Raises:
        CheckpointError: The manifest is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not path.exists():
        raise CheckpointError(f"{folder}: no checkpoint: there is no {MANIFEST} in it")
    data = _read(path)
    try:
        body = json.loads(data)
    except ValueError:  # also what is not UTF-8
        raise CheckpointError(f"{path}: damaged (not JSON)") from None
    if not isinstance(body, dict) or _sealed(body) != data:
        raise CheckpointError(f"{path}: damaged (its digest does not match)")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: has format {body['format']}; this version reads format {FORMAT}")
    return body["step"], {name: Entry(**entry) for name, entry in body["files"].items()}


def read_files(folder: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the verified content of each file of a checkpoint.

    Raises:
        CheckpointError: A file is missing, extra, or has another size or content than `entries` say.
    """
    _check_names_and_sizes(folder, entries)
    for name, entry in entries.items():
        data = _read(folder / name)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointError(f"{folder / name}: damaged (its SHA-256 is not the manifest's)")
        yield name, data


def _check_names_and_sizes(folder: Path, entries: Mapping[str, Entry]) -> None:
    present = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
    problems = [f"{folder / name}: missing" for name in sorted(entries.keys() - present.keys())]
    problems += [f"{present[name]}: not in the manifest" for name in sorted(present.keys() - entries.keys())]
    for name in sorted(entries.keys() & present.keys()):
        size, wanted = present[name].lstat().st_size, entries[name].size
        if not present[name].is_file():
            problems.append(f"{present[name]}: not a file")
        elif size != wanted:
            problems.append(f"{present[name]}: damaged ({size} bytes, the manifest says {wanted})")
    if problems:
        raise CheckpointError(*problems)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:  # a failing disk is one more way to be damaged
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _write(path: Path, data: bytes) -> Entry:
    with ThreadPoolExecutor(max_workers=1) as pool:  # hash while the disk works: both leave Python's lock
        digest = pool.submit(hashlib.sha256, data)
        path.write_bytes(data)
        fsync_file(path)
        return Entry(size=len(data), sha256=digest.result().hexdigest())


def _encode(step: int, entries: Mapping[str, Entry]) -> bytes:
    files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in entries.items()}
    return _sealed({"format": FORMAT, "step": step, "files": files})


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The one way to write `body` with its digest; any other text, were it but a space, is damage."""
    body = {key: value for key, value in body.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "digest": digest}, sort_keys=True, indent=1) + "\n").encode()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own (safetensors refuses aliases)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        memory = here.untyped_storage().data_ptr()
        plain[name] = here.clone() if memory in seen else here
        seen.add(memory)
    return plain
