"""Keeps cuDNN's attention from taking a plan that was made for gradients of another layout."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

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
