"""The length that a Matroska or WebM file announces for itself.

FFmpeg reads a file that was cut off up to its end without an error. EBML (RFC 8794) writes lengths as numbers
whose first byte tells, by its leading zeros, how many bytes follow; all ones mean "unknown".
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

SEGMENT = bytes.fromhex("18538067")


def matroska_length(path: Path) -> int:
    """Return how many bytes the file must have: its header and its segment; 0 if it does not say."""
    with path.open("rb") as file:
        file.seek(4)
        header = _read_length(file)
        if header is None:
            return 0
        file.seek(header, 1)
        if file.read(4) != SEGMENT:
            return 0
        segment = _read_length(file)
        return 0 if segment is None else file.tell() + segment


def _read_length(file: BinaryIO) -> int | None:
    """Read an EBML length; None if it is unknown or damaged."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    count = 9 - first[0].bit_length()
    rest = file.read(count - 1)
    value = int.from_bytes(first + rest, "big") & ((1 << 7 * count) - 1)
    unknown = value == (1 << 7 * count) - 1
    return None if unknown or len(rest) < count - 1 else value
