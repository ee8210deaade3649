"""Which values of a graph one generated kernel writes, and in which order the kernels run.

As torch's code generator decides it (`torch/_inductor/scheduler.py`): what reads the same values, or one the
other's, is computed in one kernel, those with most in common first, unless one would have to wait for another
kernel that waits for the other. A kernel that writes several values needs memory for all of them at once, so
two are left apart that would hold for much longer what they read, or what they write (`can_fuse` and
`can_fuse_horizontal` in `torch/_inductor/choices.py`).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from tworeel.planning import nodes

_LEAST_SHARED = 1024
"""Bytes that two kernels should have in common to be joined; vectors cost nothing to read twice."""
_FARTHEST = 64
"""Values between two kernels that are joined though neither reads the other's."""
_WORTH = 32
"""Bytes that a joined kernel may hold for each that it does not read twice."""

Kernel = list[fx.Node]
"""The values that it writes."""


def kernels_of(parts: Sequence[Kernel], reads: Mapping[fx.Node, set[fx.Node]]) -> list[Kernel]:
    """Join kernels as far as they go, and put them in order.

    Args:
        parts: a kernel for each value that is written, in the graph's order; several values of one operation
            are one already.
        reads: what each value is computed from: other values and inputs.
    """
    kernels = _Kernels(parts, reads)
    while kernels.join():
        pass
    return kernels.in_order()


class _Kernels:
    """As many as there are left; arguments as `kernels_of`'s."""

    def __init__(self, parts: Sequence[Kernel], reads: Mapping[fx.Node, set[fx.Node]]) -> None:
        self._values = {number: list(part) for number, part in enumerate(parts)}
        self._reads = reads
        self._kernel_of = {value: number for number, part in self._values.items() for value in part}
        self._place = {value: i for i, value in enumerate(reads)}
        self._uses = Counter(read for values in reads.values() for read in values)

    def join(self) -> bool:
        """Join pairs, those first that have most in common; whether there were any."""
        common: dict[tuple[int, int], int] = defaultdict(int)
        for value, users in self._generated_users().items():
            for pair in itertools.combinations(sorted(users), 2):
                common[pair] += nodes.size(value)
        joined = False
        for (one, other), shared in sorted(common.items(), key=lambda item: (-item[1], item[0])):
            if shared < _LEAST_SHARED or not {one, other} <= self._values.keys():
                continue
            if (
                self._go_over_the_same(one, other)
                and not self._hold_more(one, other, shared)
                and not self._are_far(one, other)
                and not self._waits(one, other)
                and not self._waits(other, one)
            ):
                moved = self._values.pop(other)
                self._values[one] += moved
                self._kernel_of |= dict.fromkeys(moved, one)
                joined = True
        return joined

    def in_order(self) -> list[Kernel]:
        """Each kernel behind those that it waits for, else by its first value; values as in the graph."""
        order: list[int] = []
        done: set[int] = set()

        def first(number: int) -> int:
            return min(self._place[value] for value in self._values[number])

        def visit(number: int) -> None:
            if number not in done:
                done.add(number)
                for before in sorted(self._before(number), key=first):
                    visit(before)
                order.append(number)

        for number in sorted(self._values, key=first):
            visit(number)
        return [sorted(self._values[number], key=self._place.__getitem__) for number in order]

    def _generated_users(self) -> dict[fx.Node, set[int]]:
        """The generated kernels that read or write each value."""
        users: dict[fx.Node, set[int]] = defaultdict(set)
        for number, values in self._values.items():
            for value in () if nodes.is_whole(nodes.made_by(values[0])) else values:
                for touched in (value, *self._reads[value]):
                    users[touched].add(number)
        return users

    def _before(self, number: int) -> set[int]:
        """The kernels whose values this one reads."""
        read = (value for own in self._values[number] for value in self._reads[own])
        return {self._kernel_of[value] for value in read if value in self._kernel_of} - {number}

    def _go_over_the_same(self, one: int, other: int) -> bool:
        """Whether kernels go over as many elements, or one over what the other's sum is given, or gives."""
        first, second = self._elements_of(one), self._elements_of(other)
        if (first[0] == first[1]) is (second[0] == second[1]):
            return first == second
        return not {*first}.isdisjoint(second)

    def _elements_of(self, number: int) -> tuple[int, int]:
        """Those of a kernel's sum, if it has one."""
        found = [nodes.elements(value) for value in self._values[number]]
        return next((pair for pair in found if pair[0] != pair[1]), found[0])

    def _hold_more(self, one: int, other: int, shared: int) -> bool:
        """Whether the kernels apart may use the same memory for what they read, far more than they share."""
        alike = self._read_here_alone(one) & self._read_here_alone(other)
        return sum(size for _, size in alike) > _WORTH * shared

    def _read_here_alone(self, number: int) -> set[tuple[Any, int]]:
        """Dtype and bytes of what other kernels write for this one alone."""
        own = self._values[number]
        read = {value for written in own for value in self._reads[written]}.difference(own)
        return {
            (value.meta["val"].dtype, nodes.size(value))
            for value in read
            if value in self._kernel_of and self._uses[value] == 1
        }

    def _are_far(self, one: int, other: int) -> bool:
        """Whether kernels are far apart of which neither reads what the other writes."""
        if one in self._before(other) or other in self._before(one):
            return False
        first, second = ([self._place[value] for value in self._values[number]] for number in (one, other))
        return max(max(first) - min(second), max(second) - min(first)) > _FARTHEST

    def _waits(self, later: int, earlier: int) -> bool:
        """Whether a kernel waits for another by way of a third."""
        waiting = list(self._before(later) - {earlier})
        seen = set(waiting)
        while waiting:
            found = self._before(waiting.pop())
            if earlier in found:
                return True
            waiting += found - seen
            seen |= found
        return False
