"""In which order the stages work on their micro-batches: pure functions, no tensors.

1F1B: PipeDream-Flush, https://arxiv.org/abs/2006.09503, section 2.2.
Interleaved 1F1B: https://arxiv.org/abs/2104.04473, section 2.2.2.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Action:
    """One stage's forward ("F") or backward ("B") of one micro-batch."""

    kind: Literal["F", "B"]
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


Order = list[Action]


def make_orders(devices: Sequence[Hashable], num_micro_batches: int, *, slack: int = 0) -> list[Order]:
    """The orders of work for stages on these devices, one for each stage or, interleaved, for each device.

    Args:
        devices: of each stage. Two or more devices that stand several times in the same order, as in
            `[0, 1, 0, 1]`, are interleaved. One device alone takes one micro-batch after the other, as it
            gains nothing by having several at a time. A CPU's stages run side by side: there, and in all
            other cases, each stage has an order of its own.
        num_micro_batches: M.
        slack: see `one_f_one_b`; interleaving has slack of its own.
    """
    distinct = list(dict.fromkeys(devices))
    if len(distinct) == 1 and not str(distinct[0]).startswith("cpu"):
        stages = range(len(devices))
        return [[a for number in range(num_micro_batches) for a in _there_and_back(number, stages)]]
    per_device, rest = divmod(len(devices), len(distinct))
    if len(distinct) > 1 and per_device > 1 and not rest and list(devices) == distinct * per_device:
        return interleaved(len(distinct), per_device, num_micro_batches)
    return one_f_one_b(len(devices), num_micro_batches, slack=slack)


def most_in_flight(orders: Sequence[Order], num_stages: int) -> list[int]:
    """The most micro-batches whose activations each stage holds at a time."""
    most = [0] * num_stages
    for order in orders:
        held = [0] * num_stages
        for action in order:
            held[action.stage] += 1 if action.kind == "F" else -1
            most[action.stage] = max(most[action.stage], held[action.stage])
    return most


def at_work(order: Order) -> Iterator[tuple[Mapping[int, int], int]]:
    """At each action: the micro-batches whose activations each of the order's stages holds, and who works."""
    held = {action.stage: 0 for action in order}
    for action in order:
        held[action.stage] += action.kind == "F"
        yield held, action.stage
        held[action.stage] -= action.kind == "B"


class Held(NamedTuple):
    """The most that a stage holds at a time."""

    in_flight: int
    """Micro-batches whose activations it holds."""
    given: int
    """Micro-batches whose inputs it holds: they arrive when the stage before is done."""
    waiting: int
    """Hidden states that wait for their turn or are about to leave, and gradients of such that wait."""


def most_held(in_flight: Sequence[int]) -> list[Held]:
    """The most that each stage holds at a time.

    Args:
        in_flight: of each stage, as `most_in_flight` gives it.
    """
    last = len(in_flight) - 1
    found = []
    for stage, own in enumerate(in_flight):
        given = in_flight[max(0, stage - 1)]
        # One is about to leave, and the gradients of all but the one that works wait; the last has neither.
        found.append(Held(own, given, given - own if stage == last > 0 else given))
    return found


def interleaved(num_devices: int, stages_per_device: int, num_micro_batches: int) -> list[Order]:
    """Each device's order of work when it has several stages: device d has the stages d, d + P, d + 2P, …

    A micro-batch passes each device several times, for a part of the work each time, so the pipeline is
    filled and drained in smaller pieces: with v stages a device, the share of the time that a device
    computes is v M / (v M + P - 1) where P divides M.

    Args:
        num_devices: P, at least 2.
        stages_per_device: v.
        num_micro_batches: M. The micro-batches go in groups of P; the first takes the rest of M / P too.

    Returns:
        P lists of 2vM actions.
    """
    assert num_devices >= 2 and stages_per_device >= 1 and num_micro_batches >= 1
    first = min(num_micro_batches, num_devices + num_micro_batches % num_devices)
    begins = range(first, num_micro_batches, num_devices)
    groups = [range(first), *(range(begin, begin + num_devices) for begin in begins)]
    orders = []
    for device in range(num_devices):
        stages = range(device, num_devices * stages_per_device, num_devices)
        forwards = [Action("F", number, s) for group in groups for s in stages for number in group]
        backwards = [Action("B", number, s) for group in groups for s in stages[::-1] for number in group]
        ahead = 2 * (num_devices - device - 1) + (stages_per_device - 1) * first
        orders.append(_alternate(forwards, backwards, ahead))
    return orders


def _alternate(forwards: Order, backwards: Order, ahead: int) -> Order:
    """Some forwards, then a forward and a backward in turns, then the backwards that are left."""
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[max(0, len(forwards) - ahead) :]


def one_f_one_b(num_stages: int, num_micro_batches: int, *, slack: int = 0) -> list[Order]:
    """Each stage's order of work: a few forwards to fill the pipeline, then one backward per forward.

    Args:
        num_stages: P.
        num_micro_batches: M.
        slack: micro-batches that each stage but the last may hold beyond what 1F1B needs. One absorbs the
            jitter between stages and costs the activations of one more micro-batch.

    Returns:
        P lists of 2M actions. Stage s never holds more than `in_flight(P, s)` micro-batches.
    """
    assert num_stages >= 1 and num_micro_batches >= 1 and slack >= 0
    return [
        _stage_order(stage, num_micro_batches, in_flight(num_stages, stage, slack=slack))
        for stage in range(num_stages)
    ]


def one_by_one_first(orders: Sequence[Order], num_first: int) -> list[Order]:
    """The same work, but the first micro-batches go all the way forth and back, each before the next.

    For steps that compile. Each stage still takes the micro-batches in the same order.

    Args:
        orders: as `make_orders` gives them for the other micro-batches.
        num_first: how many go before these.
    """
    first = []
    for order in orders:
        stages = sorted({action.stage for action in order})
        alone = (_there_and_back(number, stages) for number in range(num_first))
        others = [Action(a.kind, a.micro_batch + num_first, a.stage) for a in order]
        first.append([*chain.from_iterable(alone), *others])
    return first


def _there_and_back(number: int, stages: Sequence[int]) -> Order:
    """A micro-batch's forward through these stages, and its backward."""
    return [*(Action("F", number, s) for s in stages), *(Action("B", number, s) for s in reversed(stages))]


def in_flight(num_stages: int, stage: int, *, slack: int = 0) -> int:
    """The most micro-batches whose activations stage `stage` holds at a time: P - s, plus the slack."""
    depth = num_stages - stage
    return depth + slack if depth > 1 else 1


def _stage_order(stage: int, num_micro_batches: int, depth: int) -> Order:
    order: Order = []
    for step in range(num_micro_batches + depth - 1):
        if step < num_micro_batches:
            order.append(Action("F", step, stage))
        if step >= depth - 1:
            order.append(Action("B", step - depth + 1, stage))
    return order


def ideal_efficiency(num_stages: int, num_micro_batches: int) -> float:
    """The share of the time that each of P equal stages computes under 1F1B: M / (M + P - 1)."""
    return num_micro_batches / (num_micro_batches + num_stages - 1)
