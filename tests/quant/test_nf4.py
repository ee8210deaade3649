"""NF4 through bitsandbytes: the same numbers as its own layer, in a form that moves with the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tworeel.quant import quantize_blocks

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_that_of_bitsandbytes_own_layer(dtype):
    linear = nn.Linear(128, 96, dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, quant_type="nf4", compute_dtype=dtype)
    theirs.load_state_dict(linear.state_dict())
    theirs.weight.data = linear.weight.data
    theirs.to("cpu")
    model = nn.Sequential(linear)
    quantize_blocks(model, "nf4", ["0"])
    expected = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    torch.testing.assert_close(model[0].dequantized(), expected, rtol=1e-6, atol=1e-7)


def test_a_number_takes_little_more_than_four_bits():
    model = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
    quantize_blocks(model, "nf4", ["0"])
    layer = model[0]
    tables = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name != "nested_code")
    assert (layer.weight.nbytes + tables) * 8 / 512**2 < 4.14


def test_everything_moves_with_the_module():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_blocks(model, "nf4", ["0"])
    model.to("meta")
    assert model(torch.ones(1, 64, device="meta")).is_meta
