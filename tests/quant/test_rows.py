"""Rounding to 8 bits: how far off, and what becomes of zeros and of values that are not finite."""

from __future__ import annotations

import pytest
import torch

from tworeel.quant.rows import dequantize_weight, quantize_rows, quantize_weight

FP8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_int8_is_at_most_half_a_step_off(source):
    values = torch.randn(40, 96).to(source)
    quantized, scales = quantize_rows(values, INT8)
    error = (quantized.float() * scales - values.float()).abs()
    assert (error <= scales * 0.5001).all()
    assert quantized.abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_fp8_is_at_most_a_sixteenth_off(source):
    values = torch.randn(40, 96).to(source).float()
    quantized, scales = quantize_rows(values.to(source), FP8)
    error = (quantized.float() * scales - values).abs()
    # Below 2^-6 of the scale, e4m3 numbers are evenly spaced by 2^-9.
    assert (error <= (values.abs() * 2**-4).maximum(scales * 2**-10) * 1.0001).all()
    assert quantized.float().abs().amax(dim=1).eq(448).all()


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e30])
def test_rows_of_any_size_stay_finite(dtype, size):
    values = torch.randn(4, 32) * size
    quantized, scales = quantize_rows(values, dtype)
    back = quantized.float() * scales
    assert torch.isfinite(back).all()
    if size in (1e-20, 1e30):
        torch.testing.assert_close(back, values, rtol=0.1, atol=size * 0.02)


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_vanish(dtype, value):
    values = torch.randn(2, 32)
    values[1, 5] = value
    quantized, scales = quantize_rows(values, dtype)
    assert torch.isfinite(scales[0]) and not torch.isfinite(scales[1])
    assert not torch.isfinite(quantized.float() * scales)[1].any()


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_a_weight_in_pieces_is_what_its_rows_are(dtype, monkeypatch):
    weight = torch.randn(37, 48, dtype=torch.bfloat16)
    expected, scales = quantize_rows(weight, dtype)
    monkeypatch.setattr("tworeel.quant.rows._PIECE", 8 * 48)
    quantized, found = quantize_weight(weight, dtype)
    assert torch.equal(quantized.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(found, scales.squeeze(1))
    back = dequantize_weight(quantized, found, weight.shape, torch.float32)
    assert torch.equal(back, expected.float() * scales)
