"""Gives memory back to the devices."""

from __future__ import annotations

import gc
import traceback

import torch


def clear_frames(error: BaseException) -> None:
    """Let go of what the frames hold that an error came through, and those of what it came from."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def release_memory() -> None:
    """Give back what nothing refers to any more, and what the allocator keeps of it.

    Waits for all devices. torch would wait for the current one only, while another's memory is unmapped under
    what is still queued there (https://github.com/pytorch/pytorch/issues/196258, in 2.13 and before).
    """
    gc.collect()
    if not torch.accelerator.is_available():
        return
    for index in range(torch.accelerator.device_count()):
        torch.accelerator.synchronize(index)
    torch.accelerator.empty_cache()
