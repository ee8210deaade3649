"""What a traced block costs: bytes that it holds, operations and traffic. Reads graphs, computes nothing.

A graph is what `torch.compile` hands to its code generator: a forward or a backward of core operations. The
generator fuses: a value is written to memory where a matrix product or an attention reads or writes it, where
it leaves the graph, and where a sum over many elements ends; everything between is computed as it is read.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_VIEWS = {
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
_PARTS = {aten.split, aten.split_with_sizes, aten.unbind, aten.chunk}
_SUMS = {
    aten.sum,
    aten.mean,
    aten.var_mean,
    aten.amax,
}
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
_UNCOUNTED = {aten._int_mm, _ATTENTION, _ATTENTION_BACKWARD}
"""What torch's own counter does not know."""
_MANY_READERS = 4
"""A value that more operations read than this is written, as torch's code generator does."""


@dataclass(frozen=True)
class Work:
    """What one run of something costs.

    Attributes:
        products: operations of matrix products, by the dtype of what is multiplied; 2 for each multiplication
            and addition.
        attention: operations of attentions.
        traffic: bytes read and written by all that is neither.
        kernels: that the host launches for it.
    """

    products: Mapping[torch.dtype, float] = field(default_factory=dict)
    attention: float = 0.0
    traffic: float = 0.0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        dtypes = {*self.products, *other.products}
        return Work(
            {dtype: self.products.get(dtype, 0.0) + other.products.get(dtype, 0.0) for dtype in dtypes},
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
        )

    def __sub__(self, other: Work) -> Work:
        products = {dtype: -count for dtype, count in other.products.items()}
        return self + Work(products, -other.attention, -other.traffic, -other.kernels)


@dataclass(frozen=True)
class GraphCost:
    """What a graph holds and costs."""

    peak: int
    """Bytes beyond its inputs, at the moment of the most."""
    end: int
    """Bytes beyond its inputs when it has ended: what it returns."""
    work: Work


class GraphReader:
    """Follows the memory of a traced graph, one value that is written after the other.

    Args:
        graph: whose nodes carry fake tensors.
        released: inputs that nothing else holds, by name: their memory is free after their last use. Those
            with an equal value show the same memory.
    """

    def __init__(
        self, graph: fx.Graph, released: Mapping[str, str] | None = None, num_weights: int = 0
    ) -> None:
        self._nodes = list(graph.nodes)
        self._of_weights = self._find_of_weights(num_weights)
        self._released = released or {}
        self._owners: dict[str, fx.Node] = {}
        for node in self._nodes:
            if node.op == "placeholder" and node.name in self._released:
                self._owners.setdefault(self._released[node.name], node)
        self._inputs = {node for node in self._nodes if node.op == "placeholder"}
        self._output = next(node for node in self._nodes if node.op == "output")
        self._written = self._find_written()
        self._reads = {node: self._find_reads(node) for node in self._nodes if node in self._written}

    def cost(self) -> GraphCost:
        """Walk through the graph once."""
        order = [node for node in self._nodes if node in self._written and node not in self._of_weights]
        last_use = {read: i for i, node in enumerate(order) for read in self._reads[node]}
        kept = {self._origin(node) for node in self._output.all_input_nodes}
        live = peak = 0
        # What is made of weights alone takes little of a card, but the host launches it: casts of the LoRA's.
        work = Work(kernels=sum(_kernels(node) for node in self._written & self._of_weights))
        for i, node in enumerate(order):
            live += _size(node)
            peak = max(peak, live)
            work += self._work_of(node)
            for read in {*self._reads[node], node}:
                made = read not in self._inputs and read not in self._of_weights
                free = made or read.name in self._released
                if last_use.get(read, -1) <= i and read not in kept and free:
                    live -= _size(read)
                    last_use[read] = len(order)
        return GraphCost(peak=peak, end=live, work=work)

    def returned(self) -> dict[str, str]:
        """What the graph returns and has made itself: name -> name of the value whose memory it shows."""
        return {
            node.name: origin.name
            for node in self._output.all_input_nodes
            if (origin := self._origin(node)) not in self._inputs and origin not in self._of_weights
        }

    def _find_of_weights(self, num_weights: int) -> set[fx.Node]:
        """Values that depend on nothing but weights."""
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        weights = set(inputs[:num_weights])
        found: set[fx.Node] = set()
        for node in self._nodes:
            known = node.all_input_nodes
            if node.op == "call_function" and known and all(n in weights or n in found for n in known):
                found.add(node)
        return found

    def _origin(self, node: fx.Node) -> fx.Node:
        """The value whose memory a view shows."""
        while node.op == "call_function" and _packet(node) in _VIEWS:
            node = node.args[0]  # type: ignore[assignment]  # a view's first argument is what it shows
        return self._owners.get(self._released.get(node.name, ""), node)

    def _find_written(self) -> set[fx.Node]:
        written = {self._origin(node) for node in self._output.all_input_nodes}
        for node in self._nodes:
            if node.op != "call_function" or _packet(node) in _VIEWS:
                continue
            if _is_heavy(node):
                written |= {node, *map(self._origin, node.all_input_nodes)}
            elif node.target is operator.getitem or _packet(node) in _SUMS or len(node.users) > _MANY_READERS:
                written.add(node)
        return written - self._inputs

    def _find_reads(self, node: fx.Node) -> set[fx.Node]:
        """The written values and inputs that a value is computed from."""
        found: set[fx.Node] = set()
        waiting = list(node.all_input_nodes)
        seen: set[fx.Node] = set()
        while waiting:
            origin = self._origin(waiting.pop())
            if origin in seen:
                continue
            seen.add(origin)
            if origin in self._written or origin in self._inputs:
                found.add(origin)
            else:
                waiting += origin.all_input_nodes
        return found

    def _work_of(self, node: fx.Node) -> Work:
        if _is_heavy(node):
            return work_of(node.target, [_value(argument) for argument in node.args], _value(node))
        if node.target is operator.getitem and _is_heavy(node.args[0]):
            return Work()
        return Work(traffic=_size(node) + sum(map(_size, self._reads[node])), kernels=_kernels(node))


def operations(target: Any, args: Sequence[Any], out: Any) -> float:
    """Operations of a matrix product or an attention, from its tensors; 0 for anything else."""
    packet = getattr(target, "overloadpacket", target)
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
    packet = getattr(target, "overloadpacket", target)
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
    return Work({matrices[0].dtype: count}, kernels=1)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_heavy(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and is_heavy(node.target)


def _kernels(node: fx.Node) -> int:
    """What returns several values is one kernel with them, or none: parts of a tensor are no copies."""
    return int(node.target is not operator.getitem and _packet(node) not in _PARTS)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _size(node: fx.Node) -> int:
    """Bytes of a value; the parts of an operation that returns several are values of their own."""
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) else 0
