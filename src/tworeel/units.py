"""Memory in the unit that people count it in."""

from __future__ import annotations

GIB = 2**30


def gibibytes(size: float) -> str:
    """Bytes -> `21.3 GiB`."""
    return f"{size / GIB:.1f} GiB"
