"""Frozen weights that wait in host memory give the same step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine.weight_streaming import (
    SLOTS,
    WeightStreamer,
    enough,
    more_and_more_streamed,
    pinned_bytes,
    spread,
)

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("residency", ["recompute", "selective", "offload-selective"])
@pytest.mark.parametrize("counts", [(1, 1), (3, 2), (0, 2)])
def test_streamed_weights_give_the_gradients_of_the_unsplit_model(residency, counts):
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(4)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    pipeline = Pipeline(model, ["cpu", "cpu"], at=[3], residency=residency, streamed=counts, slack=1)
    for _ in range(2):
        model.zero_grad()
        result = pipeline.step(batches, square_loss)
        torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
        assert_close(gradients(model), expected, 1e-10)


def test_a_plain_loop_over_streamed_weights_goes_on_as_before():
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(2)]
    _, expected = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    split(model, ["cpu", "cpu"], residency="recompute", streamed=(2, 2))
    run_unsplit(model, batches)
    assert_close(gradients(model), expected, 1e-10)


def blocks_of(count: int) -> dict[int, nn.Module]:
    """Linear layers whose weights are their position."""
    found: dict[int, nn.Module] = {}
    for position in range(count):
        found[position] = nn.Linear(8, 8, bias=False).requires_grad_(False)
        nn.init.constant_(found[position].weight, position)
    return found


def test_a_block_has_its_weights_when_it_is_used_and_the_next_ones_are_under_way():
    blocks = blocks_of(5)
    streamer = WeightStreamer(CPU, blocks)
    order = [*((p, False) for p in range(5)), *((p, True) for p in reversed(range(5)))]
    for position, backward in order * 2:
        streamer.use(position, backward=backward)
        assert (blocks[position].weight == position).all()
        following = position + (-1 if backward else 1)
        if following in blocks:
            assert following in {slot.block for slot in streamer._slots}
    assert streamer.host_bytes == 5 * 256


def test_all_blocks_share_two_slots_and_rest_in_host_memory():
    blocks = blocks_of(5)
    streamer = WeightStreamer(CPU, blocks)

    def storages() -> set[int]:
        return {block.weight.untyped_storage().data_ptr() for block in blocks.values()}

    assert len(storages()) == 5
    for position in blocks:
        streamer.use(position, backward=False)
    assert len(storages()) == SLOTS
    streamer.rest()
    assert len(storages()) == 5
    assert all((block.weight == position).all() for position, block in blocks.items())


def test_the_first_block_of_what_comes_next_is_fetched_ahead():
    blocks = blocks_of(4)
    streamer = WeightStreamer(CPU, blocks)
    streamer.use(3, backward=False)
    streamer.expect(backward=False)
    assert 0 in {slot.block for slot in streamer._slots}


def test_weights_that_wait_in_host_memory_stay_where_they_are_when_more_come():
    blocks = blocks_of(5)
    streamer = WeightStreamer(CPU, {position: blocks[position] for position in (1, 3)})
    before = [blocks[position].weight.data_ptr() for position in (1, 3)]
    streamer.add({position: blocks[position] for position in (0, 2, 4)})
    assert [blocks[position].weight.data_ptr() for position in (1, 3)] == before
    assert streamer.host_bytes == 5 * 256
    for position in blocks:
        streamer.use(position, backward=False)
        assert (blocks[position].weight == position).all()


@pytest.mark.parametrize(("count", "pinned"), [(0, 0), (1, 1024), (3, 1024 + 2048), (5, 4096), (6, 5120)])
def test_blocks_share_pinned_memory_so_that_rounding_loses_little(count, pinned):
    assert pinned_bytes([704 * MIB] * count) == pinned * MIB


def test_blocks_of_each_size_have_pinned_memory_of_their_own():
    assert pinned_bytes([3, 4, 3]) == 8 + 4
    assert pinned_bytes([0, 8]) == 8


def test_trained_parameters_stay_on_the_device():
    model = make_wan("t2v", torch.float32)
    division = split(model, ["cpu"], residency="recompute", streamed=(5,))
    frozen = sum(p.nbytes for b in model.blocks for p in b.parameters() if not p.requires_grad)
    assert frozen <= division.streamed_bytes < 1.5 * frozen + 5 * 100 * 256


def test_streamed_blocks_are_spread_evenly():
    assert spread(range(20), 4) == [2, 7, 12, 17]
    assert spread(range(10, 13), 3) == [10, 11, 12]
    assert spread(range(5), 0) == []


def test_streaming_frees_all_blocks_but_those_in_the_slots():
    assert more_and_more_streamed([7] * 10)[-1].freed == (10 - SLOTS) * 7
    assert more_and_more_streamed([7] * 7, streamed=3, slot=7)[-1].freed == 49
    assert more_and_more_streamed([], streamed=10, slot=7)[-1].freed == 0
    assert more_and_more_streamed([7])[-1].freed == 0


def test_as_many_blocks_are_streamed_as_free_enough():
    ways = more_and_more_streamed([10] * 20)
    assert [enough(missing, ways) for missing in (-5, 0, 1, 30, 180)] == [0, 0, 1 + SLOTS, 3 + SLOTS, 20]
    # Where nothing is enough, the most.
    assert enough(181, ways) == 20


def test_blocks_of_several_sizes_are_counted_each_as_it_is():
    sizes = [25] * 4 + [10] * 16
    ways = more_and_more_streamed(sizes)
    assert ways[20].freed == sum(sizes) - SLOTS * 25
    assert ways[20].pinned == pinned_bytes(sizes) < pinned_bytes([25] * 20)
    for more in range(1, 21):
        chosen = [sizes[i] for i in spread(range(20), more)]
        assert ways[more].freed == sum(chosen) - min(SLOTS, more) * max(chosen)


def test_slots_grow_with_the_largest_block_that_comes_to_be_streamed():
    assert more_and_more_streamed([25], streamed=3, slot=10)[1].freed == 25 - SLOTS * 15
