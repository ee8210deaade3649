"""Cache entries on disk: one safetensors file each, whole or absent, with a hash of its content inside.

    folder/latents/3f/3fa9….safetensors
    folder/text/07/07c2….safetensors

Entries never change, so any number of processes may read and write one folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tworeel.errors import UserError, raise_if_any
from tworeel.files import sweep_temporaries, write_bytes_atomic

HASH_FIELD = "tworeel.sha256"
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header: 64 bits, little-endian


class BadEntry(UserError):
    """A cache entry that is missing, damaged or lies under another entry's name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: the cache entry {reason}; building the cache again replaces it alone")


class CacheStore:
    """The entries of one cache folder, by the keys that `tworeel.cache.keys` makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, key: str) -> Path:
        """Return where the entry lies, or would lie."""
        kind, digest = key.split("/")
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"

    def has(self, key: str) -> bool:
        """Say whether there is such an entry, intact or not."""
        return self.path_of(key).is_file()

    def read(self, key: str) -> dict[str, Tensor]:
        """Return an entry's tensors, on the CPU.

        Raises:
            BadEntry: It is missing, or its content is not what was written.
        """
        path = self.path_of(key)
        try:
            data = path.read_bytes()  # not mapped: Windows could not replace a file that is mapped
            tensors = safetensors.torch.load(data)
        except FileNotFoundError:
            raise BadEntry(path, "is missing") from None
        except SafetensorError as error:
            raise BadEntry(path, f"is damaged ({error})") from error
        if _stored_hash(data) != content_hash(key, tensors):
            raise BadEntry(path, "is damaged (its SHA-256 differs)")
        return tensors

    def is_intact(self, key: str) -> bool:
        """Read the whole entry and say whether its content is what was written."""
        try:
            self.read(key)
        except BadEntry:
            return False
        return True

    def write(self, key: str, tensors: Mapping[str, Tensor], *, subject: str) -> None:
        """Write an entry, so that a crash leaves it whole or absent.

        Args:
            key: its name; an entry of that name is replaced.
            tensors: CPU tensors by name.
            subject: the clip or caption that it belongs to, for messages.

        Raises:
            UserError: A tensor holds NaN or Inf.
            OSError: The disk is full or not writable.
        """
        raise_if_any(_non_finite(tensors, subject))
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(whole, {HASH_FIELD: content_hash(key, whole)})
        path = self.path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_bytes_atomic(path, data)
        except PermissionError:  # Windows: another process has just written this entry and reads it now
            if not self.is_intact(key):
                raise

    def sweep(self) -> None:
        """Remove what killed processes have left half-written."""
        for folder in self.folder.glob("*/??"):
            sweep_temporaries(folder)


def content_hash(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the key and the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored_hash(data: bytes) -> str | None:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
    return header.get("__metadata__", {}).get(HASH_FIELD)


def _non_finite(tensors: Mapping[str, Tensor], subject: str) -> list[str]:
    bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    return [
        f"{subject}: the encoder returned NaN or Inf for {count} of {tensors[name].numel()} values of "
        f"'{name}', which is not cached; check the encoder's files, or set cache.dtype to float32"
        for name, count in bad.items()
        if count
    ]
