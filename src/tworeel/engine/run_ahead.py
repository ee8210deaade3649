"""How far the host may run ahead of a device.

Launching a compiled kernel on a device with a full queue blocks while it holds Python's lock, and with it the
threads that keep the other devices busy. So the host waits after each block for the one before it.
"""

from __future__ import annotations

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

    def block_queued(self, device: torch.device) -> None:
        """Tell that a block was queued; waits until no more than `limit` others are unfinished."""
        if self.limit is None or device.type == "cpu":
            return
        queued = self._queued[device]
        queued.append(mark(device))
        while len(queued) > self.limit:
            queued.popleft().synchronize()
