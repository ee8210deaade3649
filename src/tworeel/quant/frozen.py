"""What all frozen layers have in common: how they get their weight, and the product with it dequantized.

Shapes: M rows (all leading dimensions of an input), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class FrozenLinear(nn.Linear):
    """A linear layer that keeps its weight in fewer bits and trains nothing.

    On the meta device the weight looks as it does in its file, shape (O, I) and floating dtype; `accept`
    quantizes it. The tensors that go with the quantized weight are buffers, which files do not hold. Nothing
    is derived from any of them before it is used: another tensor may take the weight's place at any time.

    Attributes:
        compute_dtype: the dtype that the weight came in.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        """Make a layer on the meta device."""
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.requires_grad_(False)
        self.compute_dtype = self.weight.dtype

    @classmethod
    def like(cls, linear: nn.Linear) -> Self:
        """Make a layer of another's sizes, with its values where they are not on the meta device."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            if not parameter.is_meta:
                made.accept(name, parameter.detach())
        return made.train(linear.training)

    def accept(self, name: str, tensor: Tensor) -> None:
        """Take the value of the weight or the bias, on the tensor's device; the weight is quantized there.

        Args:
            name: "weight" or "bias".
            tensor: shape (O, I) or (O,), of a floating dtype.
        """
        if name == "weight":
            self.compute_dtype = tensor.dtype
            tensor = self.quantize(tensor)
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the tensor that is kept for a weight of shape (O, I), and keep what goes with it."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """Return the weight that the layer stands for, shape (O, I), in the dtype that it came in."""
        raise NotImplementedError

    def _table(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)


def dequantized_linear(
    input: Tensor,
    bias: Tensor | None,
    dequantize: Callable[..., Tensor],
    stored: tuple[Tensor, ...],
    shape: tuple[int, int],
) -> Tensor:
    """Return x Wᵀ + b, shape (..., O), in the input's dtype; W is dequantized anew for the gradient of x.

    Args:
        input: x, shape (..., I).
        bias: b, shape (O,).
        dequantize: called with the stored tensors, `shape` and a dtype; returns W.
        stored: all that W is made of; only references to these are kept for the backward.
        shape: (O, I).
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        # There torch.compile (2.13) takes away a function's context if it is given one argument more than it
        # names: two stored tensors, as 8-bit weights have.
        return _product(input, bias, dequantize(*stored, shape, input.dtype))
    output: Tensor = _DequantizedLinear.apply(input, bias, dequantize, shape, *stored)
    return output


def _product(input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    return functional.linear(input, weight, None if bias is None else bias.to(input.dtype))


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        dequantize: Callable[..., Tensor],
        shape: tuple[int, int],
        *stored: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.dequantize, ctx.shape = dequantize, shape
        return _product(input, bias, dequantize(*stored, shape, input.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        return grad @ ctx.dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype), *nothing
