from __future__ import annotations

import gc
import weakref

import torch

from tworeel.engine.releasing import release_memory


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_hangs_in_a_cycle_is_gone() -> None:
    gc.disable()
    try:
        gone = weakref.ref(Node())
        assert gone() is not None
        release_memory()
        assert gone() is None
    finally:
        gc.enable()


def test_every_device_has_finished_before_memory_is_given_back(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda index: calls.append(index))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: calls.append("empty"))
    release_memory()
    assert calls == [0, 1, "empty"]
