"""How much of a LoRA a model shows, and that nothing of it is touched."""

from __future__ import annotations

import pytest
import torch

from tworeel.lora.inject import ADAPTER, lora_layers
from tworeel.lora.state import lora_state
from tworeel.lora.strength import lora_strength

KINDS = [{}, {"alpha": 3.0, "rslora": True}, {"dora": True}]


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strength_0_is_the_model_without_the_lora_to_the_bit(make_wan, make_trained, inputs, options, dtype):
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    model = make_trained(dtype, **options)
    with lora_strength(model, 0.0):
        assert torch.equal(output(model, inputs), output(make_wan(dtype), inputs))


@pytest.mark.parametrize("options", KINDS)
def test_afterwards_the_model_is_as_it_was_to_the_bit(make_trained, inputs, options):
    model = make_trained(**options)
    before, values = output(model, inputs), lora_state(model)
    scalings = [layer.scaling[ADAPTER] for layer in lora_layers(model).values()]
    with lora_strength(model, 0.3):
        assert not torch.equal(output(model, inputs), before)
    with pytest.raises(TypeError), lora_strength(model, 0.3):
        output(model, {"nothing": 1})
    assert torch.equal(output(model, inputs), before)
    assert [layer.scaling[ADAPTER] for layer in lora_layers(model).values()] == scalings
    assert all(torch.equal(values[name], tensor) for name, tensor in lora_state(model).items())


@pytest.mark.parametrize("options", KINDS)
def test_a_layer_adds_its_share(make_trained, options):
    model = make_trained(**options)
    layer = lora_layers(model)["blocks.1.ffn.net.2"]
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base, whole = layer.get_base_layer()(x), layer(x)
        with lora_strength(model, 0.25):
            torch.testing.assert_close(layer(x), base + 0.25 * (whole - base), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_lora_has_nothing_to_scale(make_wan, inputs):
    model = make_wan()
    with lora_strength(model, 0.5):
        assert torch.equal(output(model, inputs), output(make_wan(), inputs))
