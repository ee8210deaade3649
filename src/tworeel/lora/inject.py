"""Put a LoRA into a transformer, through peft."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from tworeel.lora.layers import CastDora, CastLinear, dense_weight, row_norms
from tworeel.lora.targets import find_targets

ADAPTER = "default"


def inject_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
    block_lists: Sequence[str] = (),
) -> list[str]:
    """Adapt linear layers of `model` in place; everything else is frozen.

    The LoRA's weights are fp32 (fp64 on an fp64 base), each on the device of its layer; they compute in the
    dtype of the layer's input. They start as peft's do (A uniform, B zero), but from `seed` and the layer's
    name alone: the same on any devices, in any order. The layers may be quantized, see `dense_weight`.

    Args:
        model: the transformer, with its weights already on their devices.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        targets: endings or patterns of layer names, see `find_targets`.
        rslora: scale by alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732).
        dora: train the lengths of the rows too (https://arxiv.org/abs/2402.09353).
        seed: of the start.
        block_lists: if given, only layers inside these lists of blocks are adapted.

    Returns:
        The names of the adapted layers, in the order of the model.

    Raises:
        UserError: no target is given, or one matches no layer.
    """
    names = find_targets(model, targets, block_lists)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides by the rank
        target_modules=names,
        use_rslora=rslora,
        bias="none",
    )
    model.requires_grad_(False)
    # On meta: peft's own start would only be thrown away, and would draw from the global generator.
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    layers = lora_layers(model)
    assert set(layers) == set(names), "peft adapted other layers than the targets"
    for name, layer in layers.items():
        _fill(layer, seed, name)
        if dora:
            _add_magnitude(layer)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def base_weight(layer: LoraLinear) -> Tensor:
    """Return the frozen weight of an adapted layer as it is stored; `dense_weight` dequantizes it."""
    return layer.get_base_layer().get_parameter("weight")


def layer_sizes(layer: LoraLinear) -> tuple[int, int]:
    """Return the inputs and outputs of an adapted layer."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features


def _fill(layer: LoraLinear, seed: int, name: str) -> None:
    base = base_weight(layer)
    inputs, outputs = layer_sizes(layer)
    rank = layer.r[ADAPTER]
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    down = start_of_down(rank, inputs, seed, name).to(base.device, dtype)
    up = torch.zeros(outputs, rank, device=base.device, dtype=dtype)
    layer.lora_A[ADAPTER] = CastLinear(down)
    layer.lora_B[ADAPTER] = CastLinear(up)
    layer.cast_input_dtype_enabled = False


def _add_magnitude(layer: LoraLinear) -> None:
    """Make a LoRA layer a DoRA layer, as peft does; but peft would take a quantized weight for the weight."""
    down, up = (module[ADAPTER].get_parameter("weight") for module in (layer.lora_A, layer.lora_B))
    if down.is_meta:  # a quantized layer has no tables yet
        make_dora(layer, up.new_empty(len(up)))
        return
    with torch.no_grad():
        lengths = row_norms(dense_weight(layer.get_base_layer()), down, up, 0.0)
    make_dora(layer, lengths)


def make_dora(layer: LoraLinear, magnitude: Tensor) -> None:
    """Give a LoRA layer the lengths of the merged weight's rows, shape (out,)."""
    layer.use_dora[ADAPTER] = True
    layer.lora_variant[ADAPTER] = DoraLinearVariant()
    layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_magnitude_vector")
    layer.lora_magnitude_vector[ADAPTER] = CastDora(magnitude)


def start_of_down(rank: int, inputs: int, seed: int, name: str) -> Tensor:
    """Draw A, shape (rank, inputs), fp32 on the CPU, from the seed and the layer's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)
