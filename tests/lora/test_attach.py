"""A LoRA file in a model, as diffusers would load it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_samples import random_lora

from tworeel.lora.attach import attach_lora, attach_problems
from tworeel.lora.state import export_lora
from tworeel.quant import block_linears, quantize_blocks


@pytest.mark.parametrize("dora", [False, True])
def test_the_output_is_that_of_the_trained_model(make_trained, make_wan, inputs, dora):
    trained = make_trained(alpha=2.0, dora=dora)
    model = make_wan()
    attach_lora(model, export_lora(trained))
    with torch.no_grad():
        found, expected = model(**inputs).sample, trained(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_may_have_ranks_and_scales_of_their_own(make_wan, inputs):
    lora = random_lora(1, ranks=(2, 5), alphas=(torch.tensor(1.0), None, torch.tensor(0.5)))
    model, merged = make_wan(), make_wan()
    attach_lora(model, lora)
    with torch.no_grad():
        for name, part in lora.modules.items():
            merged.get_submodule(name).weight += part.scale * part.up @ part.down
        found, expected = model(**inputs).sample, merged(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_it_fits_on_quantized_layers(make_wan, inputs):
    model = make_wan()
    quantize_blocks(model, "int8", block_linears(model, ["blocks"]))
    before = model(**inputs).sample
    attach_lora(model, random_lora(1))
    assert not torch.equal(model(**inputs).sample, before)


def test_what_is_not_of_the_model_is_named(make_wan):
    lora = random_lora(1, blocks=3)
    wide = {
        name: replace(part, down=part.down[:, :7]) if name == "blocks.0.attn1.to_k" else part
        for name, part in lora.modules.items()
    }
    problems = attach_problems(replace(lora, modules=wide), make_wan(), "my.safetensors")
    assert problems == [
        "my.safetensors: 10 of its layers are not in this model, the first is 'blocks.2.attn1.to_q'",
        "my.safetensors: 'blocks.0.attn1.to_k' has inputs and outputs (7, 256), the model's layer (256, 256)",
    ]
    assert attach_problems(replace(lora, modules={}), make_wan(), "my") == ["my: holds no LoRA"]
