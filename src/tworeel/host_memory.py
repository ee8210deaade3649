"""How much of the host's memory is left."""

from __future__ import annotations

from pathlib import Path

import psutil

HOST_SHARE = 0.8
"""Of the memory that is available, how much streamed weights and activations are planned to take."""
HOST_LIMIT = 0.85
"""How much they may: a run takes some itself before they do."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container may have; nowhere else is there such a folder."""

_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
"""Limit, what is in use, and which of that are files that memory is not short of; versions 2 and 1."""


def available_memory() -> int:
    """Bytes that this process may still have: of the machine, or of the container that it is in."""
    return min([psutil.virtual_memory().available, *_left_of_limits()])


def _left_of_limits() -> list[int]:
    found = []
    for limit, used, cached in _FILES:
        try:
            left = int((CGROUPS / limit).read_text()) - int((CGROUPS / used).read_text())
            lines = (CGROUPS / limit).with_name("memory.stat").read_text().splitlines()
            left += sum(int(count) for name, count in map(str.split, lines) if name in cached)
        except (OSError, ValueError):
            continue  # no Linux, no container, or one without a limit ("max")
        found.append(max(0, left))
    return found
