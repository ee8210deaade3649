"""What a device has to spend: bytes that are free, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tworeel.engine.fitting import total_and_free
from tworeel.planning.cards import Card
from tworeel.planning.timing import Rates, rates_of
from tworeel.quant.matmul import Mode, matmul_mode
from tworeel.units import GIB

USABLE = 0.985
"""Of a card's nominal memory; its driver keeps the rest."""
CONTEXT = int(0.6 * GIB)
"""What CUDA and its libraries take of a card before the first tensor."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One device as the planner sees it."""

    device: str
    card: str
    total: int
    """Bytes that this process may use."""
    free: int
    """Bytes of them that no other has taken."""
    rates: Rates
    fp8_mode: Mode
    """How it multiplies fp8 weights."""
    int8_mode: Mode
    context: int | None = None
    """Bytes of the card that driver and CUDA take before the first tensor; None where the device is here."""
    measured: bool = False
    """Whether the rates rest on what was measured on this card."""
    slowdown: float = 1.0
    """How much longer they took than by the card's figures."""
    launching: float | None = None
    """How much longer its host takes to launch than the one that the figures are of; None where unknown."""

    def mode(self, quantize: str | None) -> Mode | None:
        """How it multiplies weights that are quantized so; None for those that only are kept so."""
        return {"fp8": self.fp8_mode, "int8": self.int8_mode}.get(quantize or "")

    def another(self, number: int) -> Budget:
        """The same card once more."""
        kind = torch.device(self.device).type
        return replace(self, device=f"{kind}:{number}")


def budget_of_card(card: Card, number: int) -> Budget:
    """A card of the table that nothing else runs on."""
    free = int(card.memory * USABLE) - CONTEXT
    return Budget(
        device=f"cuda:{number}",
        card=card.name,
        total=free,
        free=free,
        context=card.memory - free,
        rates=rates_of(card),
        fp8_mode=card.fp8_mode,
        int8_mode=card.int8_mode,
    )


def budget_of_device(device: torch.device, card: Card | None, fallback: Card) -> Budget:
    """A device that is there, with what is free on it now.

    Args:
        device: of this machine.
        card: what the table says of it.
        fallback: whose speed is assumed if the table does not have it.
    """
    total, free = total_and_free(device)
    return Budget(
        device=str(device),
        card=card.name if card is not None else torch.get_device_module(device).get_device_name(device),
        total=total,
        free=free,
        rates=rates_of(card or fallback),
        fp8_mode=matmul_mode(device, torch.float8_e4m3fn),
        int8_mode=matmul_mode(device, torch.int8),
    )
