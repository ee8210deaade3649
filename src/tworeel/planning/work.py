"""What an operation costs: products, attentions, traffic, launches. Counts, computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
_UNCOUNTED = {aten._int_mm, _ATTENTION, _ATTENTION_BACKWARD}
"""What torch's own counter does not know."""


@dataclass(frozen=True)
class Work:
    """What one run of something costs.

    Attributes:
        products: operations of matrix products, by the dtype of what is multiplied; 2 for each multiplication
            and addition.
        attention: operations of attentions.
        traffic: bytes read and written by all that is neither.
        kernels: that the host launches for it.
        weights: bytes of the matrices that others are multiplied with, mostly weights.
    """

    products: Mapping[torch.dtype, float] = field(default_factory=dict)
    attention: float = 0.0
    traffic: float = 0.0
    kernels: int = 0
    weights: float = 0.0

    def __add__(self, other: Work) -> Work:
        dtypes = {*self.products, *other.products}
        return Work(
            {dtype: self.products.get(dtype, 0.0) + other.products.get(dtype, 0.0) for dtype in dtypes},
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
            self.weights + other.weights,
        )

    def __sub__(self, other: Work) -> Work:
        products = {dtype: -count for dtype, count in other.products.items()}
        return self + Work(products, -other.attention, -other.traffic, -other.kernels, -other.weights)


def packet_of(target: Any) -> Any:
    """An operation, whatever its overload."""
    return getattr(target, "overloadpacket", target)


def operations(target: Any, args: Sequence[Any], out: Any) -> float:
    """Operations of a matrix product or an attention, from its tensors; 0 for anything else."""
    packet = packet_of(target)
    shapes = [argument.shape for argument in args if isinstance(argument, Tensor)]
    if packet is _ATTENTION:
        return float(sdpa_flop_count(*shapes[:3]))
    if packet is _ATTENTION_BACKWARD:
        return float(sdpa_backward_flop_count(*shapes[:4]))
    if packet is aten._int_mm:
        return float(mm_flop(*args, out_val=out))
    if packet in flop_registry:
        return float(flop_registry[packet](*args, out_val=out))
    return 0.0


def is_heavy(target: Any) -> bool:
    """Whether an operation has a kernel of its own: a matrix product, an attention."""
    packet = packet_of(target)
    return packet in flop_registry or packet in _UNCOUNTED


def is_attention(target: Any) -> bool:
    """Whether an operation is a fused attention or its backward."""
    return "scaled_dot_product" in str(target)


def work_of(target: Any, args: Sequence[Any], out: Any) -> Work:
    """What a matrix product or an attention costs, from its tensors."""
    count = operations(target, args, out)
    if is_attention(target):
        return Work(attention=count, kernels=1)
    # A bias comes before what is multiplied, scales come after it.
    matrices = [argument for argument in args if isinstance(argument, Tensor) and argument.dim() > 1]
    # With few rows it shows that the other matrix has to come from memory first.
    others = sum(matrix.nbytes for matrix in matrices[1:2])
    return Work({matrices[0].dtype: count}, kernels=1, weights=float(others))
