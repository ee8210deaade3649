"""What a traced block costs: bytes that it holds, operations and traffic. Reads graphs, computes nothing.

A graph is what `torch.compile` hands to its code generator: a forward or a backward of core operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from torch import fx

from tworeel.engine.recomputing import dequantized, is_quantized
from tworeel.planning import nodes
from tworeel.planning.fusing import kernels_of
from tworeel.planning.work import Work, work_of
from tworeel.planning.written import WrittenValues

_DEQUANTIZING = 1.5
"""Bytes that are moved for each of a weight that is made of one in 8 bits: it is read, and it is written."""


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
        num_weights: inputs, the first ones, that are weights.
        most_operations: of a kernel; what is computed in more is written.
    """

    def __init__(
        self,
        graph: fx.Graph,
        released: Mapping[str, str] | None = None,
        num_weights: int = 0,
        most_operations: float = inf,
    ) -> None:
        self._released = released or {}
        self._written = WrittenValues(graph, self._released, num_weights, most_operations)
        self._returned = graph.output_node().all_input_nodes
        self._dequantized = set(dequantized(graph))

    def cost(self) -> GraphCost:
        """Walk through the graph once, kernel by kernel."""
        written = self._written
        parts = written.by_operation()
        kernels = kernels_of(parts, written.reads)
        sizes = written.sizes(kernels)
        live = peak = 0
        apart: set[fx.Node] = set()
        for kernel, ending in zip(kernels, self._ending(kernels), strict=True):
            live += sum(sizes[value] for value in kernel)
            apart.update(self._dequantized.intersection(kernel))
            peak = max(peak, live - max(map(nodes.size, apart), default=0))
            apart.difference_update(ending)
            live -= sum(sizes.get(value, nodes.size(value)) for value in ending - written.kept)
        # Casts of the LoRA's weights, each micro-batch's; 8-bit ones are copied in the backward after all.
        of_weights = written.kept & written.of_weights
        held = sum(nodes.size(node) for node in of_weights if not is_quantized(node.meta["val"]))
        return GraphCost(peak=peak + held, end=live + held, work=self._work(parts))

    def returned(self) -> dict[str, str]:
        """What the graph returns and has made itself: name -> name of the value whose memory it shows."""
        return {
            node.name: origin.name
            for node in self._returned
            if (origin := self._written.origin(node)).op != "placeholder"
            and origin not in self._written.of_weights
        }

    def _ending(self, kernels: Sequence[Sequence[fx.Node]]) -> list[set[fx.Node]]:
        """What is free when each kernel has run."""
        reads = self._written.reads
        last_use = {
            touched: number
            for number, kernel in enumerate(kernels)
            for value in kernel
            for touched in (value, *reads[value])
        }
        found: dict[int, set[fx.Node]] = defaultdict(set)
        for value, number in last_use.items():
            if value in reads or value.name in self._released:
                found[number].add(value)
        return [found[number] for number in range(len(kernels))]

    def _work(self, parts: Sequence[Sequence[fx.Node]]) -> Work:
        # Of weights alone: casts of the LoRA's, which the host launches, and what is dequantized.
        casts = [node for node in self._written.of_weights if self._written.read_whole(node)]
        moved = _DEQUANTIZING * sum(map(nodes.size, casts))
        # Apart, as if nothing were joined: what joined kernels read less, they lose by reading slower.
        return sum(map(self._work_of, parts), Work(kernels=sum(map(nodes.kernels, casts)), weights=moved))

    def _work_of(self, kernel: Sequence[fx.Node]) -> Work:
        if nodes.is_product(kernel[0]):
            node = nodes.made_by(kernel[0])
            return work_of(node.target, [nodes.value(argument) for argument in node.args], nodes.value(node))
        read = {value for own in kernel for value in self._written.reads[own]}.difference(kernel)
        return Work(traffic=float(sum(map(nodes.size, (*kernel, *read)))), kernels=1)
