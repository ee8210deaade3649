"""How much of a LoRA a model shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tworeel.lora.inject import ADAPTER, lora_layers
from tworeel.lora.layers import CastDora


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply what the model's LoRA adds to its layers; 0 is the model without it. No weight is touched.

    Args:
        model: with or without a LoRA.
        strength: 1 is the LoRA as it was trained.
    """
    layers = lora_layers(model).values()
    before = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            if layer.use_dora[ADAPTER]:
                # Its scaling is inside of a norm, and its magnitudes count at scaling 0 too.
                _dora(layer).strength = strength
            else:
                layer.scaling[ADAPTER] = scaling * strength
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scaling
            if layer.use_dora[ADAPTER]:
                _dora(layer).strength = 1.0


def _dora(layer: nn.Module) -> CastDora:
    found = layer.get_submodule("lora_magnitude_vector").get_submodule(ADAPTER)
    assert isinstance(found, CastDora)
    return found
