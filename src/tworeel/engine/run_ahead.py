"""How far the host may run ahead of a device."""

from __future__ import annotations

import threading
from collections import defaultdict, deque

import torch

from tworeel.engine.streams import mark


class RunAhead:
    """Counts the blocks that are queued on each device.

    Args:
        limit: blocks that may be queued behind the one that a device computes; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._queued: dict[torch.device, deque[torch.Event]] = defaultdict(deque)
        self._lock = threading.Lock()

    def block_queued(self, device: torch.device) -> None:
        """Tell that a block was queued; waits until no more than the limit of others are unfinished."""
        if self.limit is None or device.type == "cpu":
            return
        with self._lock:
            queued = self._queued[device]
            queued.append(mark(device))
            surplus = [queued.popleft() for _ in range(len(queued) - self.limit)]
        for event in surplus:
            event.synchronize()
