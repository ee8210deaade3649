"""Norms of compiled blocks by PyTorch's own kernels: generated ones sum in another order.

That moves the last bits of what they give, and in bf16, a few blocks on, every gradient by as much as bf16
itself does. An operation of ours stands in the graph for a norm, so that nothing takes it apart or joins it
with its neighbours; in its place, what is generated calls PyTorch's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.library import custom_op
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tworeel.engine import recomputing

aten = torch.ops.aten

_INPUT_OF_THREE, _INPUT_OF_TWO = [True, False, False], [True, False]
"""Which gradients a norm's backward is asked for: frozen weights need none."""


@custom_op("tworeel::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed: tuple[Tensor, Tensor, Tensor] = aten.native_layer_norm(x, shape, weight, bias, eps)
    return normed


@custom_op("tworeel::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    gradients = aten.native_layer_norm_backward(gradient, x, shape, mean, rstd, weight, bias, _INPUT_OF_THREE)
    of_input: Tensor = gradients[0]
    return of_input


@custom_op("tworeel::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    normed: tuple[Tensor, Tensor] = aten._fused_rms_norm(x, shape, weight, eps)
    return normed


@custom_op("tworeel::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    gradient: Tensor, x: Tensor, shape: Sequence[int], rstd: Tensor, weight: Tensor | None
) -> Tensor:
    of_input: Tensor = aten._fused_rms_norm_backward(gradient, x, shape, rstd, weight, _INPUT_OF_TWO)[0]
    return of_input


@_layer_norm.register_fake
def _(*args: Any) -> Any:
    return aten.native_layer_norm(*args)


@_rms_norm.register_fake
def _(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(shape)]
    rstd = x.new_empty((*rows, *(1 for _ in shape)), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


@_layer_norm_backward.register_fake
@_rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.shape, weight, bias, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)


def _differentiate_layer_norm(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    return _layer_norm_backward(gradient, x, ctx.shape, *saved), None, None, None, None


def _save_rms_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.shape, weight, _ = inputs
    ctx.save_for_backward(x, output[1], weight)


def _differentiate_rms_norm(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    return _rms_norm_backward(gradient, x, ctx.shape, *saved), None, None, None


_layer_norm.register_autograd(_differentiate_layer_norm, setup_context=_save_layer_norm)
_rms_norm.register_autograd(_differentiate_rms_norm, setup_context=_save_rms_norm)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """As `torch.layer_norm`; one operation where weight and bias are frozen."""
    if _has_more_to_it(input, weight, bias):
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable)
    normed, *_statistics = _layer_norm(input, normalized_shape, weight, bias, eps)
    return normed


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    fused: bool | None = None,
) -> Tensor:
    """As `torch.rms_norm`; one operation where the weight is frozen, and PyTorch takes one kernel.

    It does for one dtype, on devices that have that kernel (aten/src/ATen/native/layer_norm.cpp).

    Args:
        input, normalized_shape, weight, eps: as `torch.rms_norm`'s.
        fused: whether the device has it. Looked up by default.
    """
    if fused is None:
        fused = _has_fused_rms_norm(input.device.type)
    mixed = weight is not None and weight.dtype != input.dtype
    if mixed or not fused or _has_more_to_it(input, weight):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    normed, _ = _rms_norm(input, normalized_shape, weight, eps)
    return normed


def _has_more_to_it(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether weights need gradients, too, or autocast decides the dtype."""
    trained = any(weight is not None and weight.requires_grad for weight in weights)
    return trained or torch.is_autocast_enabled(x.device.type)


@cache
def _has_fused_rms_norm(device_type: str) -> bool:
    key = "PrivateUse1" if device_type == torch._C._get_privateuse1_backend_name() else device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm_backward", key)


NORM_OPS = frozenset(
    {
        torch.ops.tworeel.layer_norm,
        torch.ops.tworeel.layer_norm_backward,
        torch.ops.tworeel.rms_norm,
        torch.ops.tworeel.rms_norm_backward,
    }
)
"""What stands in a graph for a norm and its gradient."""

WHOLE = {
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
"""What stands for PyTorch's functions."""


class WholeNorms(TorchFunctionMode):
    """What is run while this is on takes norms as one operation, as if its device had all kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = WHOLE.get(func, func)
        if known is rms_norm:
            known = partial(rms_norm, fused=True)
        return known(*args, **(kwargs or {}))


class RecomputedCasts(CustomGraphPass):
    """Has what was cast for a norm cast again for its backward, instead of kept.

    A block's own forward casts a hidden state to fp32 for it, twice the bytes.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark the casts in a graph of forward and backward."""
        for cast in _CASTS:
            for node in graph.find_nodes(op="call_function", target=cast):
                grows = node.meta["val"].itemsize > node.args[0].meta["val"].itemsize
                if grows and _is_read_by_norm(node):
                    recomputing.mark_recomputed(node)

    def uuid(self) -> Any:
        """What Inductor's cache tells graphs with this pass by."""
        return get_hash_for_files((__file__, recomputing.__file__))


_CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)


def _is_read_by_norm(node: fx.Node) -> bool:
    return any(getattr(user.target, "overloadpacket", None) in NORM_OPS for user in node.users)


def keep_norms_whole(graph: fx.GraphModule) -> None:
    """Let a graph of Dynamo's, and those in it, take norms as one operation."""
    _generate_calls()
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    node.target = WHOLE.get(node.target, node.target)
            module.recompile()


@cache
def _generate_calls() -> None:
    """Let Inductor call PyTorch's kernels for our operations, without a turn through Python's dispatcher."""
    from torch._inductor import lowering  # takes a second, and is there when something is compiled

    def kernel(operation: Any) -> Any:
        return lowering.fallback_handler(operation.default, add_to_fallback_set=False)

    layer_norm_backward = kernel(aten.native_layer_norm_backward)
    rms_norm_backward = kernel(aten._fused_rms_norm_backward)
    ops = torch.ops.tworeel
    for ours, theirs in {
        ops.layer_norm.default: kernel(aten.native_layer_norm),
        ops.layer_norm_backward.default: lambda *args: layer_norm_backward(*args, _INPUT_OF_THREE)[0],
        ops.rms_norm.default: kernel(aten._fused_rms_norm),
        ops.rms_norm_backward.default: lambda *args: rms_norm_backward(*args, _INPUT_OF_TWO)[0],
    }.items():
        lowering.add_needs_realized_inputs(ours)
        lowering.add_layout_constraint(ours, lowering.require_contiguous)
        lowering.register_lowering(ours, type_promotion_kind=None)(theirs)
