"""What peft's LoRA layers are given instead of its own parts: full-precision weights, the base's precision.

The trained weights are fp32 (their gradients too); they are cast to the input's dtype in the forward. peft
would cast the input to fp32 instead and keep that copy of every input for the backward: 3.8 GiB a GPU for a
14B model at 20,280 tokens.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional


class CastLinear(nn.Linear):
    """A linear layer without bias whose weight is cast to the input's dtype."""

    def __init__(self, weight: Tensor) -> None:
        """Own `weight`, shape (out, in)."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the weight to an input of shape (..., in)."""
        return functional.linear(input, self.weight.to(input.dtype))


class CastDora(DoraLinearLayer):
    """DoRA (https://arxiv.org/abs/2402.09353, eq. 5): `m / ‖W + sBA‖ · (W + sBA) x`, norms over rows.

    The same function as peft's layer, but the norms are taken in the magnitude's precision (peft's bf16 norms
    move in steps of 0.4 %) and without ever making the (out, in) update.
    """

    def __init__(self, magnitude: Tensor) -> None:
        """Own `magnitude`, shape (out,)."""
        super().__init__(fan_in_fan_out=False)
        self.weight = nn.Parameter(magnitude)
        self.strength = 1.0
        """Of what is added; a LoRA without magnitudes has it in its scaling."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,  # noqa: N803
        lora_B: nn.Linear,  # noqa: N803
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Return what is added to the base layer's output; the norm gets no gradient (section 4.3)."""
        assert base_result is not None, "DoRA with dropout is not offered"
        with torch.no_grad():
            norms = row_norms(dense_weight(base_layer), lora_A.weight, lora_B.weight, scaling)
        ratio = self.weight / norms
        directed = base_result if base_layer.bias is None else base_result - base_layer.bias
        update = lora_B(lora_A(x)) * scaling
        added = (ratio - 1).to(x.dtype) * directed + ratio.to(x.dtype) * update
        return added if self.strength == 1.0 else added * self.strength


@runtime_checkable
class Quantized(Protocol):
    """A layer that keeps its weight in another form than (out, in) numbers."""

    def dequantized(self) -> Tensor:
        """Return the weight, shape (out, in)."""


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the frozen weight of a linear layer, shape (out, in); that of a quantized one is made anew."""
    if isinstance(layer, Quantized):
        return layer.dequantized()
    # Not `get_parameter`: while a block is traced, something else stands in the parameter's place.
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the length of each row of `W + sBA`, shape (out,), in the dtype of `up`.

    ‖w + s b A‖² = ‖w‖² + 2s b·(A w) + s² b (A Aᵀ) bᵀ: no matrix of W's size is made.

    Args:
        weight: W, shape (out, in).
        down: A, shape (rank, in).
        up: B, shape (out, rank).
        scale: s.
    """
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=up.dtype)
    crossed = (weight @ down.to(weight.dtype).T).to(up.dtype)
    added = (up * (2 * crossed + scale * up @ (down @ down.T))).sum(dim=1)
    return (lengths.square() + scale * added).clamp(min=0).sqrt()
