"""How long work takes on a card, and a step on several."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tworeel.engine.schedule import Action, Order
from tworeel.planning.cards import Card
from tworeel.planning.work import Work

PRODUCT_SHARE = 0.78
"""Of a card's peak that large matrix products reach; measured: 0.76 to 0.81 (bf16, fp8, H100)."""
ATTENTION_SHARE = 0.61
"""Of a card's bf16 peak that an attention's forward reaches; measured: cuDNN on an H100, 20,280 tokens."""
ATTENTION_BACKWARD_SHARE = 0.54
TRAFFIC_SHARE = 0.62
"""Of a card's bandwidth that everything else reaches; measured: 0.57 to 0.65, from what products and
attention leave of the time of a 14B model's block, forward and backward, compiled and not, on an H100."""
PCIE_SHARE = 0.8
LAUNCH_SECONDS = {True: 32e-6, False: 26e-6}
"""What the host needs to launch a kernel of a block, compiled or not. The threads of all stages share
Python's lock, so it adds up over them. Measured where cards wait for the host: 27 to 38 µs (compiled;
FLUX.2-dev in fp8 and int8, Wan 14B, 1,536 tokens, H200s), 0.82 of that where nothing was (Wan, 1,024)."""

CPP_LAUNCH_SECONDS = 30e-6
"""From C++, where each device's threads go on their own. Machines with two H200s needed 26 µs (Wan 14B, 1,536
tokens), 29 and 30 (FLUX.2-dev in fp8, 512 x 512) and 32 (Wan 14B, 1,024 tokens)."""

PARKING_KERNELS = 34
"""As long as launching so many kernels the host takes to park what a block leaves behind, and to fetch it:
0.95 ms, on two H200s that waited for the host (FLUX.2-dev in fp8, 512 x 512, 23 blocks that park)."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card does in a second."""

    bf16: float
    """Operations of bf16 products, and of others that it has no rate for."""
    products: Mapping[torch.dtype, float]
    attention: float
    """Operations of a forward."""
    attention_backward: float
    traffic: float
    """Bytes of its memory."""
    host: float
    """Bytes each way between it and the host."""
    crossing: float
    """Bytes to the next card."""

    def forward(self, work: Work) -> float:
        """Seconds of a forward's work."""
        return self._products(work) + work.attention / self.attention

    def backward(self, work: Work) -> float:
        """Seconds of a backward's work."""
        return self._products(work) + work.attention / self.attention_backward

    def _products(self, work: Work) -> float:
        products = sum(count / self.products.get(dtype, self.bf16) for dtype, count in work.products.items())
        return products + (work.traffic + work.weights) / self.traffic

    def linked(self, host: float) -> Rates:
        """The same card in a slot that moves so many bytes; without a link of its own all crosses there."""
        crossing = host if self.crossing == self.host else self.crossing
        return replace(self, host=host, crossing=crossing)

    def slowed(self, factor: float) -> Rates:
        """The same card where everything takes `factor` times as long."""
        return replace(
            self,
            bf16=self.bf16 / factor,
            products={dtype: rate / factor for dtype, rate in self.products.items()},
            attention=self.attention / factor,
            attention_backward=self.attention_backward / factor,
            traffic=self.traffic / factor,
        )


def rates_of(card: Card) -> Rates:
    """What a card reaches of its vendor's figures."""
    products = {torch.float32: card.bf16 / 2, torch.float64: card.bf16 / 32}
    if card.fp8 is not None:
        products[torch.float8_e4m3fn] = card.fp8
    if card.int8 is not None:
        products[torch.int8] = card.int8
    return Rates(
        bf16=PRODUCT_SHARE * card.bf16,
        products={dtype: PRODUCT_SHARE * rate for dtype, rate in products.items()},
        attention=ATTENTION_SHARE * card.bf16,
        attention_backward=ATTENTION_BACKWARD_SHARE * card.bf16,
        traffic=TRAFFIC_SHARE * card.bandwidth,
        host=PCIE_SHARE * card.pcie,
        crossing=PCIE_SHARE * card.crossing,
    )


@dataclass(frozen=True)
class StepTime:
    """A step, as its stages run through it."""

    seconds: float
    busy: tuple[float, ...]
    """Share of the step in which each stage computes."""

    def at_least(self, seconds: float) -> StepTime:
        """The same work in a step that takes so long for another reason."""
        if seconds <= self.seconds:
            return self
        return StepTime(seconds, tuple(share * self.seconds / seconds for share in self.busy))

    def longer(self, count: int, more: int, devices: Sequence[Hashable]) -> StepTime:
        """With more micro-batches than `count`, played through: each takes the busiest device's work.

        Args:
            count, more: micro-batches.
            devices: of each stage.
        """
        of_one = [share * self.seconds / count for share in self.busy]
        works = dict.fromkeys(devices, 0.0)
        for device, seconds in zip(devices, of_one, strict=True):
            works[device] += seconds
        total = self.seconds + more * max(works.values())
        return StepTime(total, tuple((count + more) * seconds / total for seconds in of_one))


def simulate(
    orders: Sequence[Order],
    forward: Sequence[float],
    backward: Sequence[float],
    crossing: float = 0.0,
    *,
    devices: Sequence[Hashable] | None = None,
) -> StepTime:
    """Let each stage do its work in its order, each action as soon as what it needs is there.

    Args:
        orders: as `make_orders` gives them.
        forward, backward: seconds of each stage for one micro-batch.
        crossing: seconds from one stage to the next.
        devices: of each stage; those with the same one take turns. By default no two orders share one.
    """
    last = len(forward) - 1
    done: _Ends = {}
    own = [number if devices is None else devices[order[0].stage] for number, order in enumerate(orders)]
    clock = dict.fromkeys(own, 0.0)
    waiting = [(device, list(reversed(order))) for device, order in zip(own, orders, strict=True)]
    while any(order for _, order in waiting):
        # The one that can begin first: nothing that is done later can come before it.
        starts = [
            (max(clock[device], ready), device, order)
            for device, order in waiting
            if order and (ready := _ready(order[-1], done, last, crossing)) is not None
        ]
        assert starts, "the orders wait for each other"
        start, device, order = min(starts, key=lambda found: found[0])
        action = order.pop()
        length = (forward if action.kind == "F" else backward)[action.stage]
        clock[device] = done[action.kind, action.micro_batch, action.stage] = start + length
    count = len({action.micro_batch for order in orders for action in order})
    seconds = max(clock.values())
    busy = tuple(count * (f + b) / seconds for f, b in zip(forward, backward, strict=True))
    return StepTime(seconds, busy)


_Ends = dict[tuple[str, int, int], float]
"""When each action ends, by its kind, micro-batch and stage: as plain values, which are quick to look up."""


def _ready(action: Action, done: _Ends, last: int, crossing: float) -> float | None:
    """When what an action needs is there; None if that is not known yet."""
    stage, number = action.stage, action.micro_batch
    if action.kind == "F":
        if stage == 0:
            return 0.0
        time = done.get(("F", number, stage - 1))
    elif stage == last:
        return done.get(("F", number, stage))
    else:
        time = done.get(("B", number, stage + 1))
    return None if time is None else time + crossing
