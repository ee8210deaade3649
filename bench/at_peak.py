"""What lies in a GPU's memory when most of it is taken, by the line that asked for it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_ENTRIES = 2_000_000
_SHOWN = 20
_LEAST = 0.002
"""Of a peak: smaller sums are not told."""


@contextmanager
def watched(devices: Sequence[torch.device]) -> Iterator[dict[str, list[str]]]:
    """Note what is allocated inside; afterwards the dict has the lines of each CUDA device.

    Each line has the GiB, how many tensors they are, and where they were made. What was there before is not
    counted.
    """
    lines: dict[str, list[str]] = {}
    torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, context="alloc", stacks="python")
    try:
        yield lines
    finally:
        traces = torch.cuda.memory._snapshot()["device_traces"]
        torch.cuda.memory._record_memory_history(enabled=None)
        for device in dict.fromkeys(devices):
            lines[str(device)] = told(traces[device.index])


def told(trace: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one device's trace, as `torch.cuda.memory._snapshot` gives it."""
    sums: dict[str, list[int]] = defaultdict(list)
    for event in at_peak(trace):
        sums[_place(event["frames"])].append(event["size"])
    peak = sum(map(sum, sums.values()))
    largest = sorted(sums.items(), key=lambda item: -sum(item[1]))[:_SHOWN]
    return [
        f"{sum(sizes) / 2**30:.3f} GiB in {len(sizes)}: {place}"
        for place, sizes in largest
        if sum(sizes) >= _LEAST * peak
    ]


def at_peak(trace: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The allocations that lived when most did."""
    sizes = list(itertools.accumulate(_change(event) for event in _paired(trace)))
    peak = max(range(len(sizes)), key=sizes.__getitem__, default=-1)
    live: dict[int, Mapping[str, Any]] = {}
    for event in itertools.islice(_paired(trace), peak + 1):
        if event["action"] == "alloc":
            live[event["addr"]] = event
        else:
            del live[event["addr"]]
    return list(live.values())


def _paired(trace: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """What is allocated, and what of that is freed again."""
    known: set[int] = set()
    for event in trace:
        if event["action"] == "alloc":
            known.add(event["addr"])
            yield event
        elif event["action"] == "free_completed" and event["addr"] in known:
            known.discard(event["addr"])
            yield event


def _change(event: Mapping[str, Any]) -> int:
    size: int = event["size"]
    return size if event["action"] == "alloc" else -size


def _place(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost lines that are not torch's own."""
    own = [frame for frame in frames if "/torch/" not in frame["filename"].replace("\\", "/")]
    return " < ".join(f"{_file(frame['filename'])}:{frame['line']} {frame['name']}" for frame in own[:3])


def _file(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]
