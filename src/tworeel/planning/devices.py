"""What the devices of this machine have to spend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tworeel.planning.budgets import Budget, budget_of_device
from tworeel.planning.cards import Card, card_of_device, known_cards

UNKNOWN_CARD = "RTX 4090"
"""Whose speed stands for a card that the table does not have; its memory is asked of the card itself."""


def budgets_of_devices(
    devices: Sequence[torch.device], cards: Sequence[Card] | None = None
) -> tuple[Budget, ...]:
    """Devices of this machine, with what is free on them now.

    Args:
        devices: one a stage, once over; none of them a CPU.
        cards: that are known; those of the table by default.
    """
    cards = known_cards() if cards is None else cards
    fallback = next(card for card in known_cards() if card.name == UNKNOWN_CARD)
    budgets = []
    for device in devices:
        module = torch.get_device_module(device)
        _, total = torch.accelerator.get_memory_info(device)
        card = card_of_device(module.get_device_name(device), total, cards)
        budgets.append(budget_of_device(device, card, fallback))
    return tuple(budgets)


def budgets_on(devices: Sequence[torch.device]) -> tuple[Budget, ...] | None:
    """What the stages' devices have free, and how fast they are; None where one is a CPU."""
    return None if any(device.type == "cpu" for device in devices) else budgets_of_devices(devices)
