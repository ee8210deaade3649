"""What a compiled block's backward makes anew, where the compiler would keep it from the forward.

The compiler keeps what a kernel that it does not generate reads in the backward, however cheap it is to make
(`ban_recompute_materialized_backward`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
_DEQUANTIZING = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


class RecomputedWeights(CustomGraphPass):
    """Has frozen weights dequantized again for the gradient of what they were multiplied with.

    Kept, they would take two to four times the memory of the weights themselves, for each clip in flight.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark each dequantization in a graph of forward and backward."""
        for node in dequantized(graph):
            mark_recomputed(node)

    def uuid(self) -> Any:
        """What Inductor's cache tells graphs with this pass by."""
        return get_hash_for_files((__file__,))


def dequantized(graph: fx.Graph) -> list[fx.Node]:
    """What is made of quantized inputs, without a product or a sum, and is not quantized itself."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if not node.name.startswith("tangents")]
    of_inputs, of_quantized = set(inputs), {node for node in inputs if is_quantized(node.meta["val"])}
    found = []
    for node in graph.nodes:
        if not _is_cheap(node) or not of_inputs.issuperset(node.all_input_nodes):
            continue
        of_inputs.add(node)
        if of_quantized.isdisjoint(node.all_input_nodes):
            continue
        of_quantized.add(node)
        if not is_quantized(node.meta["val"]):
            found.append(node)
    return found


def is_quantized(value: Any) -> bool:
    """Whether it is a tensor of numbers in 8 bits, or of several in a byte."""
    return isinstance(value, Tensor) and value.dtype.itemsize == 1 and value.dtype != torch.bool


def mark_recomputed(node: fx.Node) -> None:
    """Let the backward compute a forward's node again, if it reads it."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta.setdefault("ac_graph_id", 0)  # in a checkpoint it has that one's


def _is_cheap(node: fx.Node) -> bool:
    """Whether an operation does no more than to read and to write."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    known = target in _CASTS or target.name() in _DEQUANTIZING
    return known or target.is_view or torch.Tag.pointwise in target.tags
