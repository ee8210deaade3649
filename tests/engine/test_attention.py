"""Which attention kernel is chosen, by made-up times: real ones need an accelerator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from tworeel.engine import attention
from tworeel.engine.attention import attention_backend, fastest_backends

CUDNN, FLASH, EFFICIENT = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@pytest.mark.parametrize(
    ("cards", "order"),
    [
        # One card: as fast as they are
        ([{CUDNN: 2.0, FLASH: 1.0, EFFICIENT: 3.0}], [FLASH, CUDNN, EFFICIENT]),
        # The first card's fastest would cost the second more than the first gains
        ([{CUDNN: 1.0, FLASH: 2.0}, {CUDNN: 8.0, FLASH: 3.0}], [FLASH, CUDNN]),
        # Where a kernel does not run a card takes the next: each has its fastest so
        ([{CUDNN: 1.0, FLASH: 2.0}, {FLASH: 4.0, EFFICIENT: 3.0}], [CUDNN, EFFICIENT, FLASH]),
        ([{FLASH: 1.0}, {FLASH: 1.0}], [FLASH]),
        ([{}], []),
    ],
)
def test_the_order_of_the_kernels_is_the_fastest_for_all_devices_together(monkeypatch, cards, order):
    monkeypatch.setattr(
        torch, "get_device_module", lambda _: SimpleNamespace(get_device_name=lambda device: str(device))
    )
    monkeypatch.setattr(attention, "_measured", lambda kind, card, index: cards[index])
    devices = [torch.device("cuda", index) for index in range(len(cards))]
    assert fastest_backends(devices)[: len(order)] == order
    assert len(fastest_backends(devices)) == len(set().union(*cards))


def test_on_cpus_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(attention, "sdpa_kernel", lambda *_, **__: pytest.fail("changed"))
    with attention_backend("flash", [torch.device("cpu")] * 2):
        pass
