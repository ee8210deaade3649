"""Bytes by shapes alone, against the bytes of models that are really built and quantized."""

from __future__ import annotations

import pytest
import torch
from real_models import settings_of, source_of
from torch import nn

from tworeel.demo.tiny_transformer import tiny_transformer
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.models.wan.family import WAN
from tworeel.planning.traces import TraceSettings
from tworeel.planning.weights import unit_bytes
from tworeel.quant import quantize_blocks

TINY = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 64, "ffn_dim": 256, "num_layers": 2}


def linears(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def real_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    frozen = {t.untyped_storage().data_ptr(): t for t in tensors if not t.requires_grad}
    return sum(t.nbytes for t in frozen.values())


@pytest.mark.parametrize("quantize", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_bytes_are_those_of_a_model_that_is_there(quantize: str | None, dora: bool) -> None:
    model = tiny_transformer(TINY, 0)
    for name, parameter in model.named_parameters():
        precise = set(WAN.keep_fp32) & set(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if precise else torch.bfloat16)
    layers = linears(model)
    targets = tuple(name for name in layers if name.endswith(WAN.lora_presets["all-linear"]))
    settings = TraceSettings(targets=targets, quantize=quantize, rank=4, dora=dora)
    units = unit_bytes(model, WAN, settings)
    if quantize is not None:
        quantize_blocks(model, quantize, layers)
    inject_lora(model, rank=4, alpha=4, targets=targets, dora=dora)
    assert sum(unit.trained for unit in units) == sum(p.nbytes for p in lora_parameters(model).values())
    blocks = sum(unit.frozen for unit in units if unit.is_block)
    # nf4's table of 1 KB a layer is nothing at real size.
    tables = 1024 * len(layers) if quantize == "nf4" else 0
    wanted = sum(map(real_bytes, model.blocks)) - tables
    assert blocks == pytest.approx(wanted, rel=0.01)  # nf4's scales come in whole blocks


def test_what_lies_around_the_blocks_is_counted_where_it_runs() -> None:
    model = WAN.build_transformer(source_of("wan2.2-t2v-a14b").transformer)
    units = unit_bytes(model, WAN, settings_of("wan2.2-t2v-a14b"))
    before = {unit.name for unit in units if not unit.is_block and unit.blocks_before == 0}
    after = {unit.name for unit in units if not unit.is_block and unit.blocks_before == 40}
    assert {"patch_embedding", "condition_embedder"} <= before and {"norm_out", "proj_out"} <= after
    # 14.29 B parameters, most of them in bf16
    assert sum(unit.frozen for unit in units) == pytest.approx(2 * 14.29e9, rel=0.02)
