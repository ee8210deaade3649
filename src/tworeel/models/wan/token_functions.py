"""What Wan's blocks do to each token by itself, part by part, with the numbers of diffusers' forward.

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

from tworeel.engine.per_token import parts

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

    def row(self, number: int, part: slice) -> Tensor:
        """One of the six, of shape (B, 1, width) or (B, tokens of the part, width)."""
        if self.temb.ndim == 3:
            return self.temb[:, number : number + 1]
        return self.table[:, number] + self.temb[:, part, number].float()


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
        result, statistics = torch.empty_like(hidden), list[Tensor]()
        weight, bias = (None if w is None else w.float() for w in (weight, bias))
        for part in parts(hidden):
            found, *of_part = torch.native_layer_norm(hidden[:, part].float(), shape, weight, bias, eps)
            statistics += of_part
            result[:, part] = found
        ctx.shape = shape
        ctx.save_for_backward(hidden, weight, bias, *statistics)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *statistics = ctx.saved_tensors
        result = torch.empty_like(hidden)
        for number, part in enumerate(parts(hidden)):
            of_part = statistics[2 * number : 2 * number + 2]
            whole = hidden[:, part].float()
            result[:, part] = _norm_backward(
                gradient[:, part].float(), whole, ctx.shape, *of_part, weight, bias
            )
        return result, None, None, None, None


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
        result, statistics = torch.empty_like(hidden), list[Tensor]()
        modulation, (shift, scale) = Modulation(table, temb), rows
        for part in parts(hidden):
            found, *of_part = torch.native_layer_norm(hidden[:, part].float(), shape, None, None, eps)
            statistics += of_part
            scaled = found * (1 + modulation.row(scale, part))
            torch.add(scaled, modulation.row(shift, part), out=result[:, part])
        ctx.shape, ctx.scale = shape, scale
        ctx.save_for_backward(hidden, table, temb, *statistics)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, temb, *statistics = ctx.saved_tensors
        result, modulation = torch.empty_like(hidden), Modulation(table, temb)
        for number, part in enumerate(parts(hidden)):
            scaled = gradient[:, part] * (1 + modulation.row(ctx.scale, part))
            norm = ctx.shape, *statistics[2 * number : 2 * number + 2], None, None
            result[:, part] = _norm_backward(scaled, hidden[:, part].float(), *norm)
        return result, None, None, None, None, None


def _norm_backward(gradient: Tensor, hidden: Tensor, *norm: Any) -> Tensor:
    """The input's gradient, in fp32; `norm` is shape, mean, 1 / deviation, weight and bias."""
    result: Tensor = aten.native_layer_norm_backward(gradient, hidden, *norm, [True, False, False])[0]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor, table: Tensor, temb: Tensor, gate: int) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(table, temb)
        result, modulation = torch.empty_like(hidden), Modulation(table, temb)
        for part in parts(hidden):
            torch.add(hidden[:, part], output[:, part] * modulation.row(gate, part), out=result[:, part])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result, modulation = torch.empty_like(gradient), Modulation(*ctx.saved_tensors)
        for part in parts(gradient):
            torch.mul(gradient[:, part], modulation.row(ctx.gate, part), out=result[:, part])
        return gradient, result, None, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        result = torch.empty_like(x)
        for part in parts(x):
            first, second = _angles(cos[:, part], sin[:, part])
            torch.add(x[:, part] * first, _swapped(x[:, part]) * -second, out=result[:, part])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        result = torch.empty_like(gradient)
        for part in parts(gradient):
            first, second = _angles(cos[:, part], sin[:, part])
            given = gradient[:, part]
            # Autograd rounds each product to the dtype of the input before it adds.
            products = [(given * first).type_as(given), (_swapped(given) * second).type_as(given)]
            torch.add(*products, out=result[:, part])
        return result, None, None


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a gradient and its neighbour are multiplied with: (c, c) and (s, -s) for each pair."""
    turned = sin[..., 1::2]
    return cos[..., 0::2].repeat_interleave(2, -1), torch.stack((turned, -turned), dim=-1).flatten(-2)


def _swapped(x: Tensor) -> Tensor:
    """Each pair of numbers the other way round."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
