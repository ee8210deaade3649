"""A linear layer whose weight is frozen in 4 bits. Imports bitsandbytes, which not everyone has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from tworeel.quant.frozen import FrozenLinear, dequantized_linear

_BLOCK = 64
"""Numbers of a weight that share a scale; QLoRA's."""
_NESTED_BLOCK = 256
"""Scales that share a scale of their own."""


class FrozenNf4Linear(FrozenLinear):
    """A frozen layer with an NF4 weight under doubly quantized scales (https://arxiv.org/abs/2305.14314).

    bitsandbytes' numbers, 4.13 bits each, dequantized for each use. Not its `Linear4bit`: that keeps the
    scales beside the module, where a move of the module's tensors to another device does not find them.

    Attributes:
        weight: two numbers a byte, shape (O · I / 2, 1); `in_features` and `out_features` tell its shape.
        absmax: the scale of each block of 64 numbers, 8 bits.
        nested_absmax: the scale of each block of 256 scales, fp32.
        nested_code: what the 8 bits of a scale stand for, shape (256,).
        offset: the mean of the scales, shape ().
    """

    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the packed weight and keep its scales."""
        known = weight.float() if weight.dtype == torch.float64 else weight
        packed, state = bnb.quantize_4bit(
            known.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self._table("absmax", state.absmax)
        self._table("nested_absmax", state.state2.absmax)
        self._table("nested_code", state.state2.code)
        self._table("offset", state.offset)
        return packed

    def dequantized(self) -> Tensor:
        """Return the weight that the layer stands for, shape (O, I), in the dtype that it came in."""
        return dequantize_nf4(*self._stored(), self._shape(), self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to an input of shape (..., I)."""
        return dequantized_linear(input, self.bias, dequantize_nf4, self._stored(), self._shape())

    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.absmax, self.nested_absmax, self.nested_code, self.offset

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of shape `shape` in `dtype`; the others are `FrozenNf4Linear`'s tensors."""
    scales = bnb.dequantize_blockwise(absmax, absmax=nested_absmax, code=nested_code, blocksize=_NESTED_BLOCK)
    known = torch.float32 if dtype == torch.float64 else dtype
    state = bnb.QuantState(
        scales + offset, shape=torch.Size(shape), blocksize=_BLOCK, quant_type="nf4", dtype=known
    )
    return bnb.dequantize_4bit(packed, state).to(dtype)
