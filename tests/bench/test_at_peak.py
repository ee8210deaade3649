"""What lies in memory at the peak, from traces as torch's allocator gives them."""

from __future__ import annotations

import sys
from typing import Any

from bench_scripts import BENCH

sys.path.append(str(BENCH))

from at_peak import told

GIB = 2**30


def event(action: str, address: int, gib: float, line: int = 1) -> dict[str, Any]:
    frames = [
        {"filename": "/site/torch/nn/modules/module.py", "line": 7, "name": "call"},
        {"filename": "C:\\work\\blocks.py", "line": line, "name": "forward"},
    ]
    return {"action": action, "addr": address, "size": int(gib * GIB), "frames": frames}


def test_what_lives_at_the_peak_is_summed_by_the_line_that_made_it() -> None:
    trace = [
        event("free_completed", 9, 5),  # of what was there before
        event("alloc", 1, 2, line=10),
        event("alloc", 2, 1, line=20),
        event("free_completed", 1, 2),
        event("alloc", 3, 1.5, line=20),
        event("alloc", 4, 1, line=30),
        event("free_requested", 4, 1),
        event("free_completed", 4, 1),
        event("alloc", 5, 0.25, line=40),
    ]
    assert told(trace) == ["2.500 GiB in 2: blocks.py:20 forward", "1.000 GiB in 1: blocks.py:30 forward"]


def test_where_nothing_was_allocated_nothing_is_told() -> None:
    assert told([]) == []
