"""Which layers are swapped, and what is left as it is."""

from __future__ import annotations

import sys

import pytest
import torch
from quantized_wan import make_wan
from torch import nn

from tworeel.lora.inject import inject_lora, lora_layers
from tworeel.lora.targets import find_targets
from tworeel.quant import KINDS, FrozenFp8Linear, FrozenInt8Linear, quantize_blocks
from tworeel.quant.frozen import FrozenLinear


def test_only_the_named_layers_are_swapped():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    others = [model[0].weight, model[2].weight]
    assert quantize_blocks(model, "fp8", ["1"]) == ["1"]
    assert isinstance(model[1], FrozenFp8Linear)
    assert model[0].weight is others[0] and model[2].weight is others[1]


@pytest.mark.parametrize(("kind", "dtype"), [("fp8", torch.float8_e4m3fn), ("int8", torch.int8)])
def test_a_real_layer_is_quantized_at_once_and_keeps_its_bias_and_mode(kind, dtype):
    model = nn.Sequential(nn.Linear(32, 48).to(torch.bfloat16)).eval()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    quantize_blocks(model, kind, ["0"])
    layer = model[0]
    assert (layer.weight.dtype, layer.weight.shape) == (dtype, (48, 32))
    assert (layer.weight_scale.dtype, layer.weight_scale.shape) == (torch.float32, (48,))
    assert torch.equal(layer.bias, bias) and not layer.training
    assert layer.dequantized().dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantized(), weight, rtol=0.07, atol=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_on_meta_a_layer_looks_as_before(kind):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 48, dtype=torch.bfloat16))
    expected = {name: (t.shape, t.dtype, t.device) for name, t in model.state_dict().items()}
    quantize_blocks(model, kind, ["0"])
    assert {name: (t.shape, t.dtype, t.device) for name, t in model.state_dict().items()} == expected
    assert find_targets(model, ["0"]) == ["0"]


def test_a_loras_own_layers_are_left_alone():
    model = nn.ModuleDict({"to_q": nn.Linear(32, 32)})
    inject_lora(model, rank=4, alpha=4, targets=["to_q"])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert quantize_blocks(model, "int8", names) == ["to_q.base_layer"]
    layer = lora_layers(model)["to_q"]
    assert isinstance(layer.get_base_layer(), FrozenInt8Linear)
    assert not isinstance(layer.lora_A["default"], FrozenLinear)
    assert layer.lora_B["default"].weight.dtype == torch.float32


def test_what_is_no_linear_layer_is_named_and_nothing_is_swapped():
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    with pytest.raises(ValueError, match=r"Sequential has no linear layer to quantize named 1, 7"):
        quantize_blocks(model, "fp8", ["0", "1", "7"])
    assert type(model[0]) is nn.Linear


def test_a_layer_is_not_quantized_twice():
    model = make_wan("int8")
    names = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    assert len(names) == 30
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        quantize_blocks(model, "int8", names)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'fp4' is not known; there are fp8, int8, nf4"):
        quantize_blocks(nn.Sequential(), "fp4", [])


def test_without_bitsandbytes_nf4_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "tworeel.quant.nf4", raising=False)
    with pytest.raises(ValueError, match=r"bitsandbytes: pip install 'tworeel\[eightbit\]'"):
        quantize_blocks(nn.Sequential(nn.Linear(32, 32)), "nf4", ["0"])
