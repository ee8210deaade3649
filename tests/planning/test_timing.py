from __future__ import annotations

from functools import cache

import pytest
import torch
from real_models import CLIP, settings_of, source_of

from tworeel.engine.residency import Residency
from tworeel.engine.schedule import ideal_efficiency, make_orders
from tworeel.models.wan.family import WAN
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.timing import StepTime, rates_of, simulate
from tworeel.planning.traces import BlockTrace, TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.planning.work import Work

(H100,) = parse_cards("H100 80GB", known_cards())
(H200,) = parse_cards("H200", known_cards())
(RTX_3090,) = parse_cards("RTX 3090", known_cards())


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_equal_stages_take_what_1f1b_ideally_takes(stages: int, count: int) -> None:
    orders = make_orders(range(stages), count)
    found = simulate(orders, [1.0] * stages, [2.0] * stages)
    assert found.seconds == pytest.approx(3 * (count + stages - 1))
    assert found.busy == pytest.approx([ideal_efficiency(stages, count)] * stages)


def test_the_slowest_stage_decides() -> None:
    found = simulate(make_orders([0, 1], 8, slack=1), [1.0, 2.0], [2.0, 4.0])
    assert found.seconds == pytest.approx(8 * 6 + 3)
    assert found.busy[0] < 0.55 and found.busy[1] > 0.9


def test_interleaved_stages_wait_less() -> None:
    plain = simulate(make_orders([0, 1], 8), [2.0] * 2, [4.0] * 2)
    interleaved = simulate(make_orders([0, 1, 0, 1], 8), [1.0] * 4, [2.0] * 4)
    assert interleaved.seconds < plain.seconds


@pytest.mark.parametrize("devices", [[0, 0, 1], [0, 1, 0, 2]])
def test_stages_of_one_device_take_turns(devices: list[int]) -> None:
    orders = make_orders(devices, 8)
    stages = len(devices)
    found = simulate(orders, [1.0] * stages, [2.0] * stages, devices=devices)
    alone = simulate(orders, [1.0] * stages, [2.0] * stages)
    share = sum(busy for busy, device in zip(found.busy, devices, strict=True) if device == 0)
    assert found.seconds >= 8 * 3 * devices.count(0) and share <= 1
    assert found.seconds > alone.seconds


def test_two_stages_of_the_only_device_take_what_one_of_all_blocks_takes() -> None:
    whole = simulate(make_orders([0], 4), [2.0], [4.0])
    halves = simulate(make_orders([0, 0], 4), [1.0] * 2, [2.0] * 2, devices=[0, 0])
    assert halves.seconds == pytest.approx(whole.seconds)
    assert sum(halves.busy) == pytest.approx(1)


@pytest.mark.parametrize("devices", [[0, 1, 2], [0, 1, 0, 1]])
def test_more_micro_batches_take_what_the_busiest_device_takes_for_them(devices: list[int]) -> None:
    forward, backward = ([seconds * (1 + 0.1 * i) for i in range(len(devices))] for seconds in (1.0, 2.0))
    some, all_ = (
        simulate(make_orders(devices, count), forward, backward, devices=devices) for count in (32, 100)
    )
    found = some.longer(32, 68, devices)
    assert found.seconds == pytest.approx(all_.seconds, rel=0.01)
    assert found.busy == pytest.approx(all_.busy, rel=0.01)


def test_crossings_cost_time() -> None:
    orders = make_orders([0, 1], 4)
    assert (
        simulate(orders, [1.0] * 2, [2.0] * 2, 0.5).seconds > simulate(orders, [1.0] * 2, [2.0] * 2).seconds
    )


def test_a_step_that_waits_for_something_else_is_less_busy() -> None:
    step = StepTime(2.0, (0.8, 0.4))
    assert step.at_least(1.0) == step
    assert step.at_least(4.0) == StepTime(4.0, (0.4, 0.2))


def test_8_bit_products_are_faster_where_the_card_has_them() -> None:
    bf16, fp8 = Work({torch.bfloat16: 1e15}), Work({torch.float8_e4m3fn: 1e15})
    assert rates_of(H100).forward(fp8) == pytest.approx(rates_of(H100).forward(bf16) / 2, rel=0.02)
    assert rates_of(RTX_3090).forward(fp8) == rates_of(RTX_3090).forward(bf16)


def test_an_h100_takes_what_one_measured() -> None:
    rates = rates_of(H100)
    assert rates.forward(Work({torch.bfloat16: 2 * 20_280 * 5120**2})) == pytest.approx(1.32e-3, rel=0.1)
    attention = Work({}, 4.0 * 20_280**2 * 5120)
    assert rates.forward(attention) == pytest.approx(14.0e-3, rel=0.05)
    assert rates.backward(Work({}, 2.5 * attention.attention)) == pytest.approx(39.4e-3, rel=0.05)


def test_a_slowed_card_takes_so_much_longer() -> None:
    work = Work({torch.bfloat16: 1e15, torch.float8_e4m3fn: 1e15}, 1e15, 1e12)
    rates = rates_of(H100)
    assert rates.slowed(1.5).forward(work) == pytest.approx(1.5 * rates.forward(work))
    assert rates.slowed(1.5).backward(work) == pytest.approx(1.5 * rates.backward(work))


@cache
def traced(settings: TraceSettings) -> BlockTrace:
    """Of a block of A14B."""
    (block,) = trace_model(WAN, source_of("wan2.2-t2v-a14b"), CLIP, settings).blocks.values()
    return block


# Milliseconds of one block, forward and backward, of a 14B model at 20,280 tokens (docs/benchmarks.md).
@pytest.mark.parametrize(
    ("residency", "forward", "backward"),
    [(Residency.KEEP, 37, 66), (Residency.SELECTIVE, 38, 87), (Residency.RECOMPUTE, 37, 107)],
)
def test_a_compiled_block_takes_what_it_took_on_an_h100(
    residency: Residency, forward: float, backward: float
) -> None:
    settings = settings_of("wan2.2-t2v-a14b", exact=False)
    block = traced(settings)
    rates = rates_of(H100)
    assert 1e3 * rates.forward(block.forward) == pytest.approx(forward, rel=0.05)
    again = rates.forward(block.recomputed[residency])
    assert 1e3 * (rates.backward(block.backward) + again) == pytest.approx(backward, rel=0.05)


# Seconds of two blocks and what is around them, at 20,280 tokens (docs/benchmarks.md).
@pytest.mark.parametrize(
    ("compile", "exact", "residency", "seconds"),
    [
        (False, True, Residency.KEEP, 0.2284),
        (False, True, Residency.RECOMPUTE, 0.3161),
        (True, True, Residency.KEEP, 0.2080),
        (True, True, Residency.SELECTIVE, 0.2409),
        (True, False, Residency.KEEP, 0.1993),
    ],
)
def test_two_blocks_take_what_two_took_on_an_h200(
    compile: bool, exact: bool, residency: Residency, seconds: float
) -> None:
    settings = settings_of("wan2.2-t2v-a14b", compile=compile, exact=exact)
    block = traced(settings)
    rates = rates_of(H200)
    again = rates.forward(block.recomputed[residency])
    one = rates.forward(block.forward) + again + rates.backward(block.backward)
    assert 2 * one == pytest.approx(seconds, rel=0.05)
