"""A LoRA file's layers in a model, as they are in the file: for use, not for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from tworeel.lora.inject import ADAPTER, base_weight, lora_layers, make_dora
from tworeel.lora.layers import CastLinear
from tworeel.lora.state import layer_problems
from tworeel.lora.tensors import LoraFile, LoraTensors


def attach_lora(model: nn.Module, lora: LoraFile) -> None:
    """Adapt the layers that a LoRA has, each with its own rank and scale; nothing is trainable.

    Args:
        model: the transformer, with its weights already on their devices; they may be quantized.
        lora: without `attach_problems`.
    """
    model.requires_grad_(False)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(lora.modules), bias="none")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    layers = lora_layers(model)
    assert set(layers) == set(lora.modules), "peft adapted other layers than the file's"
    for name, part in lora.modules.items():
        _fill(layers[name], part)
    model.requires_grad_(False)


def _fill(layer: LoraLinear, part: LoraTensors) -> None:
    base = base_weight(layer)
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    layer.r[ADAPTER], layer.scaling[ADAPTER] = part.rank, part.scale
    layer.lora_A[ADAPTER] = CastLinear(part.down.to(base.device, dtype))
    layer.lora_B[ADAPTER] = CastLinear(part.up.to(base.device, dtype))
    layer.cast_input_dtype_enabled = False
    if part.magnitude is not None:
        make_dora(layer, part.magnitude.to(base.device, dtype))


def attach_problems(lora: LoraFile, model: nn.Module, source: str) -> list[str]:
    """Say why a LoRA is not for this model, one line a problem; known before the model is loaded.

    Args:
        lora: what the file holds.
        model: the transformer, on the meta device.
        source: the file's name, for messages.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [f"{source}: {problem}" for problem in _problems(lora, linears)]


def _problems(lora: LoraFile, linears: Mapping[str, nn.Linear]) -> Iterator[str]:
    if not lora.modules:
        yield "holds no LoRA"
    foreign = [name for name in lora.modules if name not in linears]
    if foreign:
        yield f"{len(foreign)} of its layers are not in this model, the first is '{foreign[0]}'"
    for name, part in lora.modules.items():
        if name in linears:
            sizes = (linears[name].in_features, linears[name].out_features)
            yield from layer_problems(name, part, sizes)
