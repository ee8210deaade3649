"""Devices and what they hold."""

from __future__ import annotations

import pytest
import torch

from tworeel.errors import UserError
from tworeel.training.devices import available_devices, forget_peaks, peak_memory, resolve_devices, room

CPU = torch.device("cpu")


def test_there_is_always_a_device() -> None:
    assert available_devices()
    assert resolve_devices(None) == tuple(map(torch.device, available_devices()))


def test_a_device_may_stand_more_than_once() -> None:
    assert resolve_devices(["cpu", "cpu", "cpu"]) == (CPU, CPU, CPU)


def test_every_name_that_is_no_device_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        resolve_devices(["cpu", "cuda:99", "gpu"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith("engine.devices: 'cuda:99' does not exist; there are ")
    assert "cpu" in caught.value.problems[0]


def test_a_kind_without_a_number_is_its_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tworeel.training.devices.available_devices", lambda: ["cuda:0", "cuda:1"])
    assert resolve_devices(["cuda", "cuda:1"]) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert resolve_devices(None) == (torch.device("cuda:0"), torch.device("cuda:1"))


def test_peaks_are_forgotten_on_each_accelerator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", forgotten.append)
    forget_peaks([torch.device("cuda:0"), CPU, torch.device("cuda:0")])
    assert forgotten == [torch.device("cuda:0")]


def test_memory_is_told_once_for_each_device() -> None:
    peaks = peak_memory([CPU, CPU])
    assert list(peaks) == ["cpu"] and peaks["cpu"] > 10**6


def test_a_process_may_have_what_it_holds_already() -> None:
    found = room([CPU, CPU])
    assert list(found) == ["cpu"] and found["cpu"] > peak_memory([CPU])["cpu"]
