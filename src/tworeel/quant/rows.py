"""Numbers to 8 bits and back, with one scale a row.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-30
"""Rows are scaled as if they reached this at least: a smaller scale is no normal fp32 number, or 0."""
_PIECE = 2**25
"""Numbers of a weight that are quantized at a time, through an fp32 copy of 128 MiB."""


def quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to `dtype` under a scale of its own: q = round(x / s), s = max|x| / the largest number.

    A row that holds a NaN or an infinity gets such a scale, so that it does not vanish.

    Args:
        values: shape (R, C), any floating dtype.
        dtype: `float8_e4m3fn` or `int8`, of which -128 is not used.

    Returns:
        q, shape (R, C), and s, shape (R, 1), fp32.
    """
    largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=-1, keepdim=True).float()
    scales = largest.clamp(min=_SMALLEST) / _largest(dtype)
    scaled = values / scales
    if not dtype.is_floating_point:
        scaled = scaled.round_()
    return scaled.to(dtype), scales


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize a weight's rows, its output channels, some at a time.

    Args:
        weight: shape (R, C).
        dtype: as for `quantize_rows`.

    Returns:
        The quantized weight, shape (R, C), and the scale of each row, shape (R,), fp32.
    """
    quantized = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        piece = slice(first, first + rows)
        quantized[piece], column = quantize_rows(weight[piece], dtype)
        scales[piece] = column.squeeze(1)
    return quantized, scales


def dequantize_weight(quantized: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return s · q in `dtype`: computed in fp32, or in fp64 if that is wanted.

    Args:
        quantized: q, of as many numbers as `shape`, (R, C).
        scales: s, shape (R,).
        shape: of the result.
        dtype: of the result.
    """
    precise = torch.promote_types(dtype, torch.float32)
    return quantized.to(precise).mul_(scales.to(precise)[:, None]).reshape(shape).to(dtype)


def _largest(dtype: torch.dtype) -> float:
    # A number out of a table of ours would be an input of compiled graphs, read from the host.
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
