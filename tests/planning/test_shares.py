"""Boundaries between unlike cards, from weights alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from real_models import budgets_of

from tworeel.planning.shares import WEIGHTS_SHARE, BlockWeights, share_out
from tworeel.units import GIB

A14B = [BlockWeights(350 * 2**21, {torch.bfloat16: 350 * 2**20})] * 40
"""About the bytes of a Wan 14B expert's blocks."""


def stages(at: tuple[int, ...], count: int = 40) -> list[int]:
    return [stop - start for start, stop in zip((0, *at), (*at, count), strict=True)]


@pytest.mark.parametrize(
    ("gpus", "blocks"),
    [("2x H100 80GB", [20, 20]), ("3x H100 80GB", [13, 13, 14]), ("H100 80GB", [40])],
)
def test_equal_cards_get_equal_shares(gpus: str, blocks: list[int]) -> None:
    assert stages(share_out(A14B, budgets_of(gpus))) == blocks


def test_a_faster_card_gets_more_blocks() -> None:
    fast, slow = stages(share_out(A14B, budgets_of("RTX 5090, RTX 3090", memory_gib="32,32")))
    rates = [budget.rates.bf16 for budget in budgets_of("RTX 5090, RTX 3090")]
    assert fast > slow
    assert fast / slow == pytest.approx(rates[0] / rates[1], rel=0.15)


def test_a_card_with_less_memory_gets_what_fits() -> None:
    at = share_out(A14B, budgets_of("2x RTX 4090", memory_gib="48,14"))
    first, second = stages(at)
    room = WEIGHTS_SHARE * budgets_of("RTX 4090", memory_gib="14")[0].free
    assert first > second
    assert second * A14B[0].size <= room < (second + 1) * A14B[0].size


def test_what_lies_beside_the_blocks_takes_of_its_cards_room() -> None:
    budgets = budgets_of("2x RTX 4090")
    assert stages(share_out(A14B, budgets)) == [20, 20]
    encoders = int(WEIGHTS_SHARE * budgets[0].free) - 18 * A14B[0].size
    assert stages(share_out(A14B, budgets, first=encoders)) == [18, 22]
    assert stages(share_out(A14B, budgets, last=encoders)) == [22, 18]


def test_where_nothing_fits_the_cards_are_as_full_as_each_other() -> None:
    first, second = stages(share_out(A14B, budgets_of("2x RTX 4090", memory_gib="12,6")))
    rooms = [budget.free for budget in budgets_of("2x RTX 4090", memory_gib="12,6")]
    assert first / second == pytest.approx(rooms[0] / rooms[1], rel=0.15)


def test_stages_on_the_same_card_share_its_memory_and_its_time() -> None:
    (large,) = budgets_of("RTX 4090", memory_gib="36")
    other = replace(large.another(1), free=100 * GIB, total=100 * GIB)
    assert stages(share_out(A14B, (large, large, other))) == [10, 10, 20]
    small = replace(large, free=12 * GIB)
    first, second, _ = stages(share_out(A14B, (small, small, other)))
    assert (first + second) * A14B[0].size <= WEIGHTS_SHARE * small.free


def test_larger_blocks_count_for_more() -> None:
    double = BlockWeights(2 * A14B[0].size, {torch.bfloat16: 700 * 2**20})
    blocks = [double] * 8 + A14B[:24]
    assert share_out(blocks, budgets_of("2x H100 80GB")) == (12,)  # half of 40 simple ones


def test_weights_in_fp8_count_by_what_the_card_does_with_them() -> None:
    fp8 = [BlockWeights(350 * 2**20, {torch.float8_e4m3fn: 350 * 2**20})] * 40
    gpus = "RTX 4090, RTX 3090"  # the first multiplies in fp8, the second only keeps it
    in_fp8, in_bf16 = (stages(share_out(blocks, budgets_of(gpus, "80,80")))[0] for blocks in (fp8, A14B))
    assert in_fp8 > in_bf16
