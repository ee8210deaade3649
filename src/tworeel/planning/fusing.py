"""Which values of a graph one generated kernel writes, and in which order the kernels run.

As torch's code generator decides it (`torch/_inductor/scheduler.py`): what reads the same values, or one the
other's, is computed in one kernel, those with most in common first, unless one would have to wait for another
kernel that waits for the other. A kernel that writes several values needs memory for all of them at once.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import fx

_LEAST_SHARED = 1024
"""Bytes that two kernels should have in common to be joined; vectors cost nothing to read twice."""

Kernel = list[fx.Node]
"""The values that it writes."""


def kernels_of(
    parts: Sequence[Kernel],
    reads: Mapping[fx.Node, set[fx.Node]],
    *,
    may_join: Callable[[fx.Node], bool],
    elements: Callable[[fx.Node], int],
    size: Callable[[fx.Node], int],
) -> list[Kernel]:
    """Join kernels as far as they go, and put them in order.

    Args:
        parts: a kernel for each value that is written, in the graph's order; several values of one operation
            are one already.
        reads: what each value is computed from: other values and inputs.
        may_join: whether the kernel of a value is generated; those of products and attentions are not.
        elements: over how many a value's kernel goes; kernels over other numbers are not joined.
        size: bytes of a value.
    """
    kernels = _Kernels(parts, reads, may_join, elements, size)
    while kernels.join():
        pass
    return kernels.in_order()


class _Kernels:
    """As many as there are left; arguments as `kernels_of`'s."""

    def __init__(
        self,
        parts: Sequence[Kernel],
        reads: Mapping[fx.Node, set[fx.Node]],
        may_join: Callable[[fx.Node], bool],
        elements: Callable[[fx.Node], int],
        size: Callable[[fx.Node], int],
    ) -> None:
        self._values = {number: list(part) for number, part in enumerate(parts)}
        self._reads = reads
        self._may_join, self._elements, self._size = may_join, elements, size
        self._kernel_of = {value: number for number, part in self._values.items() for value in part}

    def join(self) -> bool:
        """Join pairs, those first that have most in common; whether there were any."""
        common: dict[tuple[int, int], int] = defaultdict(int)
        for value, users in self._generated_users().items():
            for pair in itertools.combinations(sorted(users), 2):
                common[pair] += self._size(value)
        joined = False
        for (one, other), shared in sorted(common.items(), key=lambda item: (-item[1], item[0])):
            if shared < _LEAST_SHARED or not {one, other} <= self._values.keys():
                continue
            sizes = {max(map(self._elements, self._values[number])) for number in (one, other)}
            if len(sizes) == 1 and not self._waits(one, other) and not self._waits(other, one):
                moved = self._values.pop(other)
                self._values[one] += moved
                self._kernel_of |= dict.fromkeys(moved, one)
                joined = True
        return joined

    def in_order(self) -> list[Kernel]:
        """Each kernel behind those that it waits for, otherwise by its first value."""
        place = {value: i for i, value in enumerate(self._reads)}
        order: list[int] = []
        done: set[int] = set()

        def first(number: int) -> int:
            return min(place[value] for value in self._values[number])

        def visit(number: int) -> None:
            if number not in done:
                done.add(number)
                for before in sorted(self._before(number), key=first):
                    visit(before)
                order.append(number)

        for number in sorted(self._values, key=first):
            visit(number)
        return [self._values[number] for number in order]

    def _generated_users(self) -> dict[fx.Node, set[int]]:
        """The generated kernels that read or write each value."""
        users: dict[fx.Node, set[int]] = defaultdict(set)
        for number, values in self._values.items():
            for value in values if self._may_join(values[0]) else ():
                for touched in (value, *self._reads[value]):
                    users[touched].add(number)
        return users

    def _before(self, number: int) -> set[int]:
        """The kernels whose values this one reads."""
        read = (value for own in self._values[number] for value in self._reads[own])
        return {self._kernel_of[value] for value in read if value in self._kernel_of} - {number}

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
