"""How many bytes each part of a model takes on its card; from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tworeel.engine.placement import place
from tworeel.models.family import Family
from tworeel.planning.traces import TraceSettings

_SCALE = 4
"""Bytes of the fp32 scale that an output channel of an 8-bit weight has."""
_NF4_BITS = 4.127
"""Of a number with its share of both scales: 4 + 8/64 + 32/(64 · 256), https://arxiv.org/abs/2305.14314."""


@dataclass(frozen=True)
class UnitBytes:
    """A block, or a module around the blocks, in the order of the forward."""

    name: str
    is_block: bool
    blocks_before: int
    frozen: int
    """Bytes of its frozen weights as they are kept."""
    trained: int
    """Bytes of its LoRA's weights, which are fp32."""
    largest: int = 0
    """Bytes of its largest quantized weight once it is dequantized."""


def unit_bytes(model: nn.Module, family: Family, settings: TraceSettings) -> list[UnitBytes]:
    """Count the bytes of each unit of a model.

    Args:
        model: on the meta device, without a LoRA.
        family: of the model.
        settings: precision, and the LoRA.
    """
    return list(_units(model, family, settings))


def _units(model: nn.Module, family: Family, settings: TraceSettings) -> Iterator[UnitBytes]:
    placement, targets = place(model, ["cpu"], blocks=family.block_lists), set(settings.targets)
    # What no unit holds lies on the first stage.
    own = [(name, p) for name, p in model.named_parameters(recurse=False)]
    yield UnitBytes("", False, 0, sum(_plain(name, p, family, settings) for name, p in own), 0)
    before = 0
    for unit in placement.units:
        frozen = trained = largest = 0
        for path, module in model.get_submodule(unit.name).named_modules(prefix=unit.name):
            quantized = unit.is_block and isinstance(module, nn.Linear)
            for name, parameter in module.named_parameters(recurse=False):
                if quantized and name == "weight":
                    frozen += _quantized(parameter, settings)
                    largest = max(largest, parameter.numel() * settings.dtype.itemsize)
                else:
                    frozen += _plain(f"{path}.{name}", parameter, family, settings)
            if path in targets and isinstance(module, nn.Linear):
                trained += _lora(module, settings)
        yield UnitBytes(unit.name, unit.is_block, before, frozen, trained, largest)
        before += unit.is_block


def _plain(name: str, parameter: nn.Parameter, family: Family, settings: TraceSettings) -> int:
    precise = set(family.keep_fp32) & set(name.split("."))
    size = torch.float32.itemsize if precise else 0
    return parameter.numel() * max(size, settings.dtype.itemsize)


def _quantized(weight: nn.Parameter, settings: TraceSettings) -> int:
    match settings.quantize:
        case "fp8" | "int8":
            return weight.numel() + _SCALE * weight.shape[0]
        case "nf4":
            return int(weight.numel() * _NF4_BITS / 8)
    return weight.numel() * settings.dtype.itemsize


def _lora(linear: nn.Linear, settings: TraceSettings) -> int:
    size = max(settings.dtype.itemsize, torch.float32.itemsize)
    vectors = settings.rank * (linear.in_features + linear.out_features)
    return size * (vectors + (linear.out_features if settings.dora else 0))
