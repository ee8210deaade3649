"""What Wan's blocks do to each token by itself, with the numbers of diffusers' forward and less memory.

Sums and products are in fp32 and are rounded where diffusers' are. Backwards give what autograd gives for
diffusers' expressions, to the bit; they keep the hidden state that was given, and no fp32 copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


@dataclass(frozen=True)
class Modulation:
    """Shifts, scales and gates of a block, in fp32.

    Args:
        table: the block's own, of shape (1, 6, width).
        temb: the timestep's: of all tokens, (B, 6, width), or of each, (B, tokens, 6, width).
    """

    table: Tensor
    temb: Tensor

    @classmethod
    def of(cls, table: Tensor, temb: Tensor) -> Modulation:
        """What is the same for all tokens is added at once."""
        return cls(table, temb) if temb.ndim == 4 else cls(table, table + temb.float())

    def row(self, number: int) -> Tensor:
        """One of the six, of shape (B, 1, width) or (B, tokens, width)."""
        if self.temb.ndim == 4:
            return self.table[:, number] + self.temb[:, :, number].float()
        return self.temb[:, number : number + 1]


def normed(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """`norm(hidden.float()).type_as(hidden)`; the norm's own weights get no gradient."""
    result: Tensor = _Normed.apply(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return result


def modulated(norm: nn.LayerNorm, hidden: Tensor, modulation: Modulation, shift: int, scale: int) -> Tensor:
    """`(norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)`, with a norm that has no weights."""
    shape, rows = norm.normalized_shape, (shift, scale)
    result: Tensor = _Modulated.apply(hidden, shape, norm.eps, modulation.table, modulation.temb, rows)
    return result


def gated(hidden: Tensor, output: Tensor, modulation: Modulation, gate: int) -> Tensor:
    """`(hidden.float() + output.float() * gate).type_as(hidden)`."""
    result: Tensor = _Gated.apply(hidden, output, modulation.table, modulation.temb, gate)
    return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding: each pair of numbers is turned by its angle.

    Args:
        x: queries or keys, of shape (B, tokens, heads, head width).
        cos, sin: of shape (1, tokens, 1, head width), each number twice.
    """
    result: Tensor = _Rotated.apply(x, cos, sin)
    return result


# What a backward needs is saved, not kept as an attribute: only then is it let go when the backward is done.


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        weight, bias = (None if w is None else w.float() for w in (weight, bias))
        result, mean, rstd = torch.native_layer_norm(hidden.float(), shape, weight, bias, eps)
        ctx.shape = shape
        ctx.save_for_backward(hidden, mean, rstd, weight, bias)
        return result.type_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *norm = ctx.saved_tensors
        return _norm_backward(gradient.float(), hidden, ctx.shape, *norm), None, None, None, None


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shape: Sequence[int],
        eps: float,
        table: Tensor,
        temb: Tensor,
        rows: tuple[int, int],
    ) -> Tensor:
        modulation, (shift, scale) = Modulation(table, temb), rows
        result, mean, rstd = torch.native_layer_norm(hidden.float(), shape, None, None, eps)
        result = result * (1 + modulation.row(scale))
        ctx.shape, ctx.scale = shape, scale
        ctx.save_for_backward(hidden, mean, rstd, table, temb)
        return torch.add(result, modulation.row(shift), out=torch.empty_like(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, mean, rstd, *modulation = ctx.saved_tensors
        scaled = gradient * (1 + Modulation(*modulation).row(ctx.scale))
        return _norm_backward(scaled, hidden, ctx.shape, mean, rstd, None, None), *[None] * 5


def _norm_backward(gradient: Tensor, hidden: Tensor, *norm: Any) -> Tensor:
    """The input's gradient; `norm` is shape, mean, 1 / deviation, weight and bias."""
    wanted = [True, False, False]
    result: Tensor = aten.native_layer_norm_backward(gradient, hidden.float(), *norm, wanted)[0]
    return result.type_as(hidden)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor, table: Tensor, temb: Tensor, gate: int) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(table, temb)
        return torch.add(hidden, output * Modulation(table, temb).row(gate), out=torch.empty_like(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row = Modulation(*ctx.saved_tensors).row(ctx.gate)
        return gradient, torch.mul(gradient, row, out=torch.empty_like(gradient)), None, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        own, other = _angles(cos, -sin)
        return torch.add(x * own, _swapped(x) * other, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, other = _angles(*ctx.saved_tensors)
        # Autograd rounds each product to the dtype of the input before it adds.
        like = torch.empty_like(gradient), torch.empty_like(gradient)
        first = torch.mul(gradient, own, out=like[0])
        return first.add_(torch.mul(_swapped(gradient), other, out=like[1])), None, None


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a number and its neighbour are multiplied with: (c, c) and (s, -s) for each pair."""
    turned = sin[..., 1::2]
    return cos[..., 0::2].repeat_interleave(2, -1), torch.stack((turned, -turned), dim=-1).flatten(-2)


def _swapped(x: Tensor) -> Tensor:
    """Each pair of numbers the other way round."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
