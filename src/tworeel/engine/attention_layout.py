"""Keeps cuDNN's attention from taking a plan that was made for gradients of another layout."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.library import Library

aten = torch.ops.aten

_BACKWARD = "_scaled_dot_product_cudnn_attention_backward"


def keep_gradient_layouts() -> None:
    """Give cuDNN's backward each gradient in the layout of the output, from now on in this process.

    PyTorch keeps the plan of a backward under the layouts of query, key and value alone (`MHACacheKeyWrapper`
    in its aten/src/ATen/native/cudnn/MHA.cpp), while the gradient's layout is part of the plan. A block of
    FLUX.2 gives another one compiled than not: with both in a process, the second reads a wrong place, which
    gives wrong gradients or an illegal access (seen with torch 2.11). Builds without CUDA are left alone.
    """
    if torch.version.cuda is not None:
        lay_out_gradients(_BACKWARD, "CUDA")


@cache
def lay_out_gradients(operation: str, dispatch_key: str) -> Library:
    """Run an attention's backward with its first argument in the layout of its fifth, from now on.

    Args:
        operation: of ATen, with the arguments gradient, query, key, value, output, and more.
        dispatch_key: of its kernel.

    Returns:
        What the change lives in; this function keeps it.
    """
    kernel = torch.library.get_kernel(f"aten::{operation}", dispatch_key)

    def run(keys: Any, gradient: Tensor, *inputs: Any, **named: Any) -> Any:
        output = inputs[3]
        if gradient.stride() != output.stride():
            gradient = torch.empty_like(output).copy_(gradient)
        return kernel.call_boxed(keys, gradient, *inputs, **named)

    library = Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # it says that there was a kernel before
        library.impl(operation, run, dispatch_key, with_keyset=True)
    return library


class LaidOutGradients(CustomGraphPass):
    """`keep_gradient_layouts` for graphs that call kernels past the dispatcher: Inductor's C++ wrapper.

    Args:
        operation: an attention's backward, with the gradient first and the output as its fifth argument.
    """

    def __init__(self, operation: Any = None) -> None:
        self._operation = operation or aten._scaled_dot_product_cudnn_attention_backward.default

    def __call__(self, graph: fx.Graph) -> None:
        """Put a copy where a gradient has other strides than its output."""
        for node in graph.find_nodes(op="call_function", target=self._operation):
            gradient, output = node.args[0], node.args[4]
            strides = output.meta["val"].stride()
            if gradient.meta["val"].stride() != strides:
                with graph.inserting_before(node):
                    node.update_arg(0, _laid_out(graph, gradient, strides))

    def uuid(self) -> Any:
        """What Inductor's cache tells graphs with this pass by."""
        return get_hash_for_files((__file__,), str(self._operation))


def _laid_out(graph: fx.Graph, tensor: fx.Node, strides: tuple[int, ...]) -> fx.Node:
    """A copy of a tensor without gaps, its dimensions in memory in the order of these strides."""
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(len(order))]

    def call(target: Any, node: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, (node, *args), kwargs)
        made.meta["val"] = target(node.meta["val"], *args, **kwargs)
        return made

    there = call(aten.permute.default, tensor, order)
    copy = call(aten.clone.default, there, memory_format=torch.contiguous_format)
    return call(aten.permute.default, copy, back)
