"""How far the host may run ahead, with events that stand for a device's."""

from __future__ import annotations

import pytest
import torch

from tworeel.engine import run_ahead
from tworeel.engine.run_ahead import RunAhead

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Devices:
    """Devices that finish a block only when it is waited for: as slow as can be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unfinished: dict[torch.device, list[Event]] = {FIRST: [], SECOND: []}
        monkeypatch.setattr(run_ahead, "mark", self.mark)

    def mark(self, device: torch.device) -> Event:
        self.unfinished[device].append(event := Event(self.unfinished[device]))
        return event


class Event:
    """Behind a block; when it has happened the blocks before are finished, too."""

    def __init__(self, unfinished: list[Event]) -> None:
        self._unfinished = unfinished

    def synchronize(self) -> None:
        if self in self._unfinished:
            del self._unfinished[: self._unfinished.index(self) + 1]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_no_more_blocks_are_unfinished_than_the_limit_when_the_next_is_queued(monkeypatch, limit):
    devices, ahead = Devices(monkeypatch), RunAhead(limit)
    left = []
    for _ in range(8):
        ahead.block_queued(FIRST)
        left.append(len(devices.unfinished[FIRST]))
    assert left == [min(limit, number) for number in range(1, 9)]


def test_each_device_has_a_limit_of_its_own(monkeypatch):
    devices, ahead = Devices(monkeypatch), RunAhead(2)
    for _ in range(2):
        ahead.block_queued(FIRST)
        ahead.block_queued(SECOND)
    assert [len(unfinished) for unfinished in devices.unfinished.values()] == [2, 2]
    ahead.block_queued(SECOND)
    assert [len(unfinished) for unfinished in devices.unfinished.values()] == [2, 2]


@pytest.mark.parametrize(("limit", "device"), [(None, FIRST), (1, torch.device("cpu"))])
def test_without_a_limit_and_on_a_cpu_nothing_is_waited_for(monkeypatch, limit, device):
    monkeypatch.setattr(run_ahead, "mark", lambda _: pytest.fail("marked"))
    ahead = RunAhead(limit)
    for _ in range(3):
        ahead.block_queued(device)
