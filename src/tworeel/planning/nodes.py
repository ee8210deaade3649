"""What a node of a traced graph is: a view, a part, a sum, an operation with a kernel of its own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from tworeel.engine.norms import NORM_OPS
from tworeel.planning.work import is_heavy, packet_of

aten = torch.ops.aten

VIEWS = {
    operation.overloadpacket
    for operation in (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.alias.default,
        aten.detach.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
    )
}
_PICKING = {aten.slice, aten.select}
PARTS = {aten.split, aten.split_with_sizes, aten.unbind, aten.chunk}
_SUMS = {aten.sum, aten.mean, aten.var_mean, aten.amax}


def packet(node: fx.Node) -> Any:
    """The operation, whatever its overload."""
    return packet_of(node.target)


def computes(node: fx.Node) -> bool:
    """Whether a node is an operation that is not a view alone."""
    return node.op == "call_function" and packet(node) not in VIEWS


def is_whole(node: fx.Node) -> bool:
    """Whether a node is an operation with a kernel that is not generated."""
    return node.op == "call_function" and (is_heavy(node.target) or packet(node) in NORM_OPS)


def picking(read: fx.Node) -> list[fx.Node]:
    """The views of some elements alone by which an operation reads a value."""
    found = []
    while read.op == "call_function" and packet(read) in VIEWS:
        if packet(read) in _PICKING:
            found.append(read)
        read = read.args[0]  # type: ignore[assignment]  # what a view shows comes first
    return found


def made_by(node: fx.Node) -> fx.Node:
    """What made a value: the operation of which it is one of several results, or itself."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def numbers(node: fx.Node) -> set[Any]:
    """What an elementwise operation computes with that is no tensor."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return set()
    return {argument for argument in node.args if isinstance(argument, int | float)}


def copy_of(node: fx.Node) -> fx.Node:
    """A value like this one, in no graph."""
    copy = fx.Node(node.graph, f"{node.name}_copy", "call_function", aten.clone.default, (node,), {})
    copy.meta = node.meta
    return copy


def is_product(node: fx.Node) -> bool:
    """Whether a matrix product or an attention made a value."""
    return is_heavy(made_by(node).target)


def is_sum(node: fx.Node) -> bool:
    """Whether a sum over many elements made a value."""
    return packet(made_by(node)) in _SUMS


def ends_kernel(node: fx.Node) -> bool:
    """Whether a value is written because of what makes it."""
    return is_whole(made_by(node)) or is_sum(node)


def elements(node: fx.Node) -> tuple[int, int]:
    """How many numbers a value has, and over how many the kernel that makes it goes."""
    given = made_by(node).args[0] if is_sum(node) else node
    return _number(node), max(_number(node), _number(given))


def _number(node: Any) -> int:
    found = node.meta.get("val")
    return found.numel() if isinstance(found, Tensor) else 0


def kernels(node: fx.Node) -> int:
    """That run for a node: what returns several values has one with them, parts of a tensor are no copies."""
    return int(node.target is not operator.getitem and packet(node) not in PARTS)


def value(argument: Any) -> Any:
    """An argument as a fake tensor, if it is one."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def size(node: fx.Node) -> int:
    """Bytes of a value; the parts of an operation that returns several are values of their own."""
    found = node.meta.get("val")
    return found.nbytes if isinstance(found, Tensor) else 0
