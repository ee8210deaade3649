"""How far the host may run ahead of a device.

What a copy beside the computation reads is free only when the copy is done, not when the host lets go of it:
far ahead, the host would want memory for many blocks at once. So the host waits after each block for one that
it queued a few blocks before.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque

import torch

from tworeel.engine.streams import HOST, mark, side_stream

WITH_COPIES = 2
"""The limit where none is given, for blocks whose activations or weights are copied."""


class RunAhead:
    """Counts the blocks that are queued on each device.

    Args:
        limit: blocks that may be queued behind the one that a device computes; None for no limit but where
            copies hold memory.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._queued: dict[torch.device, deque[torch.Event]] = defaultdict(deque)
        self._lock = threading.Lock()

    def block_queued(self, device: torch.device, *, copies: bool = False, leaving: bool = False) -> None:
        """Tell that a block was queued; waits until no more than the limit of others are unfinished.

        Args:
            device: that it was queued on.
            copies: the block's activations or weights cross to or from the host.
            leaving: it is finished only when its activations have left the device, too.
        """
        limit = WITH_COPIES if self.limit is None and copies else self.limit
        if limit is None or device.type == "cpu":
            return
        done = side_stream(device, "out", HOST).record_event() if leaving else mark(device)
        with self._lock:
            queued = self._queued[device]
            queued.append(done)
            surplus = [queued.popleft() for _ in range(len(queued) - limit)]
        for event in surplus:
            event.synchronize()
