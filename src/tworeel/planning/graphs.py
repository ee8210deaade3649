"""What a traced block costs: bytes that it holds, operations and traffic. Reads graphs, computes nothing.

A graph is what `torch.compile` hands to its code generator: a forward or a backward of core operations. The
generator fuses: a value is written to memory where a matrix product, an attention or a norm that is left
whole reads or writes it, where it leaves the graph, where a sum over many elements ends, and where it is
computed from many others; what lies between is computed as it is read (`torch/_inductor/graph.py`,
`run_node`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from tworeel.engine.norms import NORM_OPS
from tworeel.engine.recomputing import dequantized
from tworeel.planning.fusing import kernels_of

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
_READS_IF_USED_AGAIN = 4
_READS = 8
"""A value that is computed from more values than this is written; with several readers, from fewer
(torch's `realize_reads_threshold` and `realize_acc_reads_threshold`)."""
_DEQUANTIZING = 1.5
"""Bytes that are moved for each of a weight that is made of one in 8 bits: it is read, and it is written."""


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


@dataclass(frozen=True)
class GraphCost:
    """What a graph holds and costs."""

    peak: int
    """Bytes beyond its inputs, at the moment of the most; without one weight that is dequantized then."""
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
        self._dequantized = set(dequantized(graph))
        self._released = released or {}
        self._owners: dict[str, fx.Node] = {}
        for node in self._nodes:
            if node.op == "placeholder" and node.name in self._released:
                self._owners.setdefault(self._released[node.name], node)
        self._inputs = {node for node in self._nodes if node.op == "placeholder"}
        self._output = next(node for node in self._nodes if node.op == "output")
        self._readers = self._find_readers()
        self._reads = self._find_reads()

    def cost(self) -> GraphCost:
        """Walk through the graph once, kernel by kernel."""
        parts = self._parts()
        kernels = kernels_of(
            parts,
            self._reads,
            may_join=lambda value: not _is_whole(_operation(value)),
            elements=_elements,
            size=_size,
        )
        last_use = {
            touched: i
            for i, kernel in enumerate(kernels)
            for value in kernel
            for touched in (value, *self._reads[value])
        }
        ending: dict[int, list[fx.Node]] = defaultdict(list)
        for value, i in last_use.items():
            ending[i].append(value)
        kept = {self._origin(node) for node in self._output.all_input_nodes}
        live = peak = 0
        apart: set[fx.Node] = set()
        # Of weights alone: casts of the LoRA's, which the host launches, and what is dequantized.
        casts = [node for node in self._of_weights if any(map(_is_whole, self._readers[node]))]
        work = Work(kernels=sum(map(_kernels, casts)), weights=_DEQUANTIZING * sum(map(_size, casts)))
        # Apart, as if nothing were joined: what joined kernels read less, they lose by reading slower.
        for part in parts:
            work += self._work_of(part)
        for i, kernel in enumerate(kernels):
            live += sum(map(_size, kernel))
            apart.update(self._dequantized.intersection(kernel))
            peak = max(peak, live - max(map(_size, apart), default=0))
            apart.difference_update(ending[i])
            for value in ending[i]:
                if value not in kept and (value in self._reads or value.name in self._released):
                    live -= _size(value)
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

    def _find_reads(self) -> dict[fx.Node, set[fx.Node]]:
        """What each value that is written is computed from: written values, and inputs."""
        returned = {self._origin(node) for node in self._output.all_input_nodes}
        written: dict[fx.Node, set[fx.Node]] = {}
        computed: dict[fx.Node, set[fx.Node]] = {}
        for node in self._nodes:
            if not _computes(node) or node in self._of_weights:
                continue
            reads: set[fx.Node] = set()
            for origin in map(self._origin, node.all_input_nodes):
                reads |= computed.get(origin, {origin})
            using = self._readers[node]
            many = _READS_IF_USED_AGAIN if len(using) > 1 else _READS
            is_written = _ends_kernel(node) or node in returned or any(map(_is_whole, using))
            if is_written or (len(reads) > many and _packet(node) not in _PARTS):
                written[node] = reads
            else:
                computed[node] = reads
        return written

    def _find_readers(self) -> dict[fx.Node, set[fx.Node]]:
        """The operations that read a value, or a view of it."""
        readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in self._nodes:
            if _computes(node):
                for origin in map(self._origin, node.all_input_nodes):
                    readers[origin].add(node)
        return readers

    def _parts(self) -> list[list[fx.Node]]:
        """The values by the operation that they are of."""
        parts: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for value in self._reads:
            parts[_operation(value)].append(value)
        return list(parts.values())

    def _work_of(self, kernel: Sequence[fx.Node]) -> Work:
        if _is_product(kernel[0]):
            node = _operation(kernel[0])
            return work_of(node.target, [_value(argument) for argument in node.args], _value(node))
        read = {value for own in kernel for value in self._reads[own]} - set(kernel)
        return Work(traffic=float(sum(map(_size, (*kernel, *read)))), kernels=1)


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
    # With few rows it shows that the other matrix has to come from memory first.
    others = sum(matrix.nbytes for matrix in matrices[1:2])
    return Work({matrices[0].dtype: count}, kernels=1, weights=float(others))


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and _packet(node) not in _VIEWS


def _is_whole(node: Any) -> bool:
    """Whether an operation has a kernel that is not generated."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return is_heavy(node.target) or _packet(node) in NORM_OPS


def _operation(node: fx.Node) -> fx.Node:
    """What made a value: the operation of which it is one of several results, or itself."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _is_product(node: fx.Node) -> bool:
    """Whether a matrix product or an attention made a value."""
    return is_heavy(_operation(node).target)


def _ends_kernel(node: fx.Node) -> bool:
    """Whether a value is written because of what makes it."""
    return _is_whole(_operation(node)) or _packet(_operation(node)) in _SUMS


def _elements(node: fx.Node) -> int:
    """Over how many numbers the kernel that makes a value goes."""
    made_by = _operation(node)
    if _packet(made_by) in _SUMS:
        made_by = made_by.args[0]  # type: ignore[assignment]
    value = made_by.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _kernels(node: fx.Node) -> int:
    """What returns several values is one kernel with them, or none: parts of a tensor are no copies."""
    return int(node.target is not operator.getitem and _packet(node) not in _PARTS)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _size(node: fx.Node) -> int:
    """Bytes of a value; the parts of an operation that returns several are values of their own."""
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) else 0
