"""ComfyUI's fp8_scaled files dequantize exactly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tworeel.errors import UserError
from tworeel.weights.scaled_fp8 import Dequantized
from tworeel.weights.tensor_files import TensorFiles

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def opened(tmp_path, **tensors: torch.Tensor) -> Dequantized:
    save_file(
        {name.replace("__", "."): tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    return Dequantized(TensorFiles(tmp_path / "x.safetensors"))


def comfy_quant(**content: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_a_weight_is_multiplied_by_its_scale_in_fp32_and_rounded_once(tmp_path, spelling, shape, dtype):
    scale = torch.rand(shape) + 0.1
    files = opened(
        tmp_path,
        scaled_fp8=torch.zeros(2, dtype=torch.float8_e4m3fn),
        a__weight=WEIGHT,
        a__scale_input=torch.tensor(3.0),
        a__bias=torch.ones(6),
        **{f"a__{spelling}": scale},
    )

    assert set(files.names) == {"a.bias", "a.weight"}
    per_row = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    assert torch.equal(files.read("a.weight", dtype), (WEIGHT.float() * per_row).to(dtype))


def test_the_later_form_with_json_tensors_is_read(tmp_path):
    files = opened(
        tmp_path,
        a__weight=WEIGHT,
        a__weight_scale=torch.tensor(0.25),
        a__input_scale=torch.tensor(1.0),
        a__comfy_quant=comfy_quant(format="float8_e4m3fn"),
    )

    assert list(files.names) == ["a.weight"]
    assert torch.equal(files.read("a.weight", torch.float32), WEIGHT.float() * 0.25)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_without_a_scale_counts_as_scale_one(tmp_path, stored):
    weight = WEIGHT.to(stored)
    files = opened(tmp_path, a__weight=weight, scaled_fp8=torch.zeros(2, dtype=stored))

    assert torch.equal(files.read("a.weight", torch.bfloat16), weight.to(torch.bfloat16))


def test_plain_files_pass_through(tmp_path):
    files = opened(tmp_path, a__weight=WEIGHT.float(), count=torch.tensor(3))

    assert torch.equal(files.read("a.weight", torch.bfloat16), WEIGHT.to(torch.bfloat16))
    assert files.read("count", torch.bfloat16).dtype == torch.int64


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a__scale_weight": torch.tensor(1.0)}, "a scale without its weight"),
        ({"a__weight": WEIGHT, "a__scale_weight": torch.ones(5)}, "neither one scale nor one a row"),
        ({"a__weight": WEIGHT.to(torch.int8), "a__weight_scale": torch.ones(())}, "only fp8"),
        ({"a__weight": WEIGHT, "a__comfy_quant": comfy_quant(format="nvfp4")}, "'nvfp4' is not supported"),
    ],
)
def test_forms_that_are_not_understood_are_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, **tensors)
    assert "x.safetensors" in str(caught.value)
