"""Linear layers whose weight is frozen in 8 bits, with one scale an output channel.

Shapes: M rows (all leading dimensions of the input), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tworeel.quant.frozen import FrozenLinear, dequantized_linear
from tworeel.quant.matmul import ALIGNMENT, Mode, matmul_mode, scaled_matmul
from tworeel.quant.rows import dequantize_weight, quantize_weight


class FrozenScaledLinear(FrozenLinear):
    """y = x (s · q)ᵀ + b, with q in 8 bits and one scale s an output channel.

    Where the device multiplies 8-bit numbers, x is rounded to them too, with a scale a row (as torchao's
    row-wise dynamic quantization, https://github.com/pytorch/ao), and so is the gradient on its way back.
    Else, for fp64, and for widths that are not multiples of 16, the weight is dequantized for each use.

    Attributes:
        weight: q, shape (O, I).
        weight_scale: s, shape (O,), fp32.
    """

    quantized_dtype: ClassVar[torch.dtype]
    weight_scale: Tensor

    def quantize(self, weight: Tensor) -> Tensor:
        """Return q and keep s."""
        quantized, scale = quantize_weight(weight, self.quantized_dtype)
        self._table("weight_scale", scale)
        return quantized

    def dequantized(self) -> Tensor:
        """Return s · q, shape (O, I), in the dtype that the weight came in."""
        return dequantize_weight(self.weight, self.weight_scale, self.weight.shape, self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to an input of shape (..., I)."""
        mode = self._mode(input)
        stored = (self.weight, self.weight_scale)
        if mode == "weight-only":
            shape = (self.out_features, self.in_features)
            return dequantized_linear(input, self.bias, dequantize_weight, stored, shape)
        rows = input.reshape(-1, self.in_features)
        output: Tensor = _ScaledLinear.apply(rows, *stored, mode)
        # Not in the function: there torch.compile (2.11) loses the gradient of a custom operation's result.
        if self.bias is not None:
            output = output.add_(self.bias)
        return output.reshape(*input.shape[:-1], self.out_features)

    def _mode(self, input: Tensor) -> Mode:
        if input.dtype == torch.float64 or self.in_features % ALIGNMENT or self.out_features % ALIGNMENT:
            return "weight-only"
        return matmul_mode(input.device, self.quantized_dtype)


class FrozenFp8Linear(FrozenScaledLinear):
    """A frozen layer with an fp8 weight (e4m3: four significant bits)."""

    quantized_dtype = torch.float8_e4m3fn


class FrozenInt8Linear(FrozenScaledLinear):
    """A frozen layer with an int8 weight (-127 … 127, evenly spaced)."""

    quantized_dtype = torch.int8


class _ScaledLinear(torch.autograd.Function):
    """The product in 8 bits, with a gradient for x alone: dL/dx = (g · s) q.

    s belongs to the outputs, over which that product sums: it has to be in g before g is rounded.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scale: Tensor, mode: Mode) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.mode = mode
        return scaled_matmul(rows, weight.t(), scale, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight, scale = ctx.saved_tensors
        # 8-bit matrix units want it column-major: a copy of one weight for the length of this call.
        columns = weight.t().contiguous().t()
        # Scales are too small for fp16.
        wide = grad.float() if grad.dtype == torch.float16 else grad
        folded = wide * scale.to(wide.dtype)
        ones = scale.new_ones(columns.shape[1])
        return scaled_matmul(folded, columns, ones, ctx.mode).to(grad.dtype), None, None, None
