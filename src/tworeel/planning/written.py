"""Which values of a graph are written to memory, and what each of them is computed from.

Torch's code generator decides it (`run_node` in `torch/_inductor/graph.py`, `StorageBox` in its `ir.py`): a
value is written where a matrix product, an attention or a norm left whole reads or writes it, where it
leaves the graph, where a sum over many elements ends, and where it is computed from many others or in many
operations. What lies between is computed as it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import fx

from tworeel.engine.norms import NORM_OPS
from tworeel.planning import nodes
from tworeel.planning.work import is_attention

aten = torch.ops.aten

_READS_IF_USED_AGAIN = 4
_READS = 8
"""A value that is computed from more values than this is written; with several readers, from fewer
(torch's `realize_reads_threshold` and `realize_acc_reads_threshold`)."""

Load = tuple[fx.Node, tuple[fx.Node, ...]]
"""A value, and what says which of its elements."""
Reads = dict[fx.Node, set[fx.Node]]
"""Of values: the written ones and the inputs that each is computed from."""


class WrittenValues:
    """The written values of a graph.

    Args:
        graph: whose nodes carry fake tensors.
        released: inputs whose memory others may show, too: those with an equal value show the same.
        num_weights: inputs, the first ones, that are weights.
        most_operations: what is computed in more is written (torch's `realize_opcount_threshold`).

    Attributes:
        reads: each of them with what it is computed from, in the graph's order.
        of_weights: values that depend on nothing but weights; they are not among the others.
        kept: what the graph returns.
    """

    def __init__(
        self,
        graph: fx.Graph,
        released: Mapping[str, str],
        num_weights: int = 0,
        most_operations: float = inf,
    ) -> None:
        self._nodes = list(graph.nodes)
        self._released = released
        self._most_operations = most_operations
        self._owners: dict[str, fx.Node] = {}
        for node in graph.find_nodes(op="placeholder"):
            if node.name in released:
                self._owners.setdefault(released[node.name], node)
        self.of_weights = self._find_of_weights(num_weights)
        self.kept = {self.origin(node) for node in graph.output_node().all_input_nodes}
        self._readers = self._find_readers()
        self._wholes: dict[fx.Node, set[fx.Node]] = {}
        self.reads: Reads = {}
        self._computed: Reads = {}
        self._find_reads()

    def origin(self, node: fx.Node) -> fx.Node:
        """The value whose memory a view shows."""
        while node.op == "call_function" and (nodes.packet(node) in nodes.VIEWS or self._shows_a_part(node)):
            node = nodes.made_by(node).args[0]  # type: ignore[assignment]  # what a view shows comes first
        return self._owners.get(self._released.get(node.name, ""), node)

    def sizes(self, kernels: Sequence[Sequence[fx.Node]]) -> dict[fx.Node, int]:
        """Bytes that come with each value; with the first of those that are put together, the whole's."""
        found = {value: nodes.size(value) for kernel in kernels for value in kernel}
        for whole, parts in self._wholes.items():
            first = next(value for value in found if value in parts)
            found |= dict.fromkeys(parts, 0) | {first: nodes.size(whole)}
        return found | dict.fromkeys(self._passing(kernels), 0)

    def read_whole(self, value: fx.Node) -> bool:
        """Whether a value is read by an operation that has a kernel of its own."""
        return any(map(nodes.is_whole, self._readers[value]))

    def by_operation(self) -> list[list[fx.Node]]:
        """The values by the operation that they are of."""
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for value in self.reads:
            found[nodes.made_by(value)].append(value)
        return list(found.values())

    def _passing(self, kernels: Sequence[Sequence[fx.Node]]) -> set[fx.Node]:
        """What a kernel computes for itself alone, and never writes after all: it needs it in one pass.

        What is computed from a sum needs another pass, behind the one for the sum.
        """
        found: set[fx.Node] = set()
        users: Reads = defaultdict(set)
        for value, read in self.reads.items():
            for one in read:
                users[one].add(value)
        for kernel in kernels:
            behind: set[fx.Node] = set()
            for value in kernel:
                before = self.reads[value].intersection(kernel)
                if not behind.isdisjoint(before) or any(map(nodes.is_sum, before)):
                    behind.add(value)
            for value in kernel:
                using = users[value]
                if using and using.issubset(kernel) and (value in behind or using.isdisjoint(behind)):
                    found.add(value)
        return found - self.kept

    def _find_of_weights(self, num_weights: int) -> set[fx.Node]:
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        weights = set(inputs[:num_weights])
        found: set[fx.Node] = set()
        for node in self._nodes:
            known = node.all_input_nodes
            if node.op == "call_function" and known and all(n in weights or n in found for n in known):
                found.add(node)
        return found

    def _find_readers(self) -> dict[fx.Node, set[fx.Node]]:
        """The operations that read a value, or a view of it."""
        readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in self._nodes:
            if nodes.computes(node):
                for origin in map(self.origin, node.all_input_nodes):
                    readers[origin].add(node)
        return readers

    def _shows_a_part(self, node: fx.Node) -> bool:
        """Whether a value is a part of one that a kernel of its own has written, and so a view of that."""
        parted = nodes.made_by(node)
        return nodes.packet(parted) in nodes.PARTS and nodes.is_whole(
            nodes.made_by(self.origin(parted.args[0]))  # type: ignore[arg-type]  # what is parted comes first
        )

    def _find_reads(self) -> None:
        steps: dict[fx.Node, set[Any]] = {}
        loads: dict[fx.Node, set[Load]] = {}
        for node in self._nodes:
            if not nodes.computes(node) or node in self.of_weights:
                continue
            origins = [self.origin(read) for read in node.all_input_nodes]
            if self._is_put_together(node, origins):
                self._computed[node] = self._put_together(node, origins)
                continue
            reads = set().union(*map(partial(self._read, node), node.all_input_nodes, origins))
            loaded = {
                (value, (*places, *_places(node, read)))
                for read, origin in zip(node.all_input_nodes, origins, strict=True)
                for value, places in loads.get(origin, {(origin, ())})
            }
            mine = nodes.numbers(node).union({node}, loaded, *(steps.get(origin, ()) for origin in origins))
            if self._is_written(node, len(loaded), len(mine)):
                self.reads[node] = reads
            else:
                self._computed[node], steps[node], loads[node] = reads, mine, loaded

    def _read(self, node: fx.Node, read: fx.Node, origin: fx.Node) -> set[fx.Node]:
        """What an operation reads for one of its arguments."""
        reads = self._computed.get(origin)
        if reads is None:
            return {origin}
        if not _takes_a_copy(node, read):
            return reads
        # Not written where it was made, so for this one.
        copy = nodes.copy_of(read)
        self.reads[copy] = reads
        return {copy}

    def _is_written(self, node: fx.Node, num_reads: int, steps: int) -> bool:
        using = self._readers[node]
        if any(self._needs(user, node, num_reads) for user in using if nodes.is_whole(user)):
            return True
        if nodes.ends_kernel(node) or node in self.kept:
            return True
        is_long = steps > self._most_operations and (num_reads > 1 or len(node.users) > 1)
        has_many = num_reads > (_READS_IF_USED_AGAIN if len(using) > 1 else _READS)
        return (is_long or has_many) and nodes.packet(node) not in nodes.PARTS

    def _needs(self, user: fx.Node, value: fx.Node, num_reads: int) -> bool:
        """Whether an operation with a kernel of its own reads a value where it was made."""
        if num_reads > 1 and nodes.packet(user) in NORM_OPS:
            return True
        reading = [read for read in user.all_input_nodes if self.origin(read) is value]
        return not all(_takes_a_copy(user, read) for read in reading)

    def _is_put_together(self, node: fx.Node, parts: Sequence[fx.Node]) -> bool:
        """Whether values are written at their places in another one: where a part is written anyway."""
        if nodes.packet(node) is not aten.cat or node in self.kept:
            return False
        return any(map(self._is_generated, parts))

    def _is_generated(self, value: fx.Node) -> bool:
        """Whether a generated kernel writes a value, and could write it elsewhere."""
        return value in self.reads and not nodes.ends_kernel(value)

    def _put_together(self, whole: fx.Node, parts: Sequence[fx.Node]) -> set[fx.Node]:
        """Write parts into a value whose memory is there from the first of them on; those parts."""
        placed: set[fx.Node] = set()
        for part in parts:
            own = part
            if part in self._computed:
                self.reads[own] = self._computed.pop(part)
            elif not self._is_generated(part):
                own = nodes.copy_of(part)
                self.reads[own] = {part}
            placed.add(own)
        self._wholes[whole] = placed
        return placed


def _places(node: fx.Node, read: fx.Node) -> list[fx.Node]:
    """What says which elements of a value an operation reads."""
    shifts = nodes.packet(node) is aten.slice_scatter and node.args[1] is read
    return [*nodes.picking(read), *([node] if shifts else [])]


def _takes_a_copy(node: fx.Node, read: fx.Node) -> bool:
    """Whether an operation, which needs its input in order, writes it for itself where nothing else does."""
    return nodes.packet(node) in NORM_OPS or (is_attention(node.target) and bool(nodes.picking(read)))
