"""Which blocks have their weights streamed."""

from __future__ import annotations

import pytest
import torch
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine import place
from tworeel.engine.streamed_blocks import StreamedBlocks, streamed_positions


def test_they_are_spread_over_each_stage_and_become_more_stage_by_stage():
    model = make_wan("t2v", torch.float32)
    placement = place(model, ["cpu", "cpu"], at=[3])
    blocks = StreamedBlocks(model, placement, streamed_positions(placement, (1, 2)))
    assert [blocks.on(stage) for stage in range(2)] == [[1], [3, 4]]
    before = blocks.host_bytes
    blocks.stream(0, 2)
    assert blocks.positions == (1, 2, 3, 4) and 2 in blocks and 0 not in blocks
    assert blocks.host_bytes * 3 == before * 4
    blocks.stream(0, 1)
    assert blocks.positions == (1, 2, 3, 4), "nothing would bring it back to its device"


@pytest.mark.parametrize("counts", [(1, 2, 3, 5), (0, 4, 5), (2, 3)])
def test_what_waits_in_host_memory_stays_there_when_more_does(counts):
    model = make_wan("t2v", torch.float32)
    placement = place(model, ["cpu"])
    blocks = StreamedBlocks(model, placement, streamed_positions(placement, counts[:1]))
    for count in counts[1:]:
        before = set(blocks.positions)
        blocks.stream(0, count)
        assert len(blocks.positions) == count and before < set(blocks.positions)


def test_as_many_are_streamed_as_there_is_host_memory_for():
    model = make_wan("t2v", torch.float32)
    blocks = StreamedBlocks(model, placement := place(model, ["cpu"]), [2])
    one = blocks.host_bytes
    assert [blocks.most(0, room) for room in (0, one - 1, one, 3 * one, None)] == [1, 1, 2, 4, 5]
    assert blocks.positions == tuple(streamed_positions(placement, (1,)))


def test_streamed_weights_leave_less_host_memory_to_activations():
    division = split(make_wan("t2v", torch.float32), ["cpu"], residency="recompute", host_limit=10**6)
    assert division.host_pool.limit == 10**6
    division.stream(0, 3)
    assert division.host_pool.limit == 10**6 - division.streamed_bytes


def test_after_a_plain_loop_the_state_dict_has_each_blocks_own_weights():
    model = make_wan("t2v", torch.float32)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    split(model, ["cpu", "cpu"], residency="recompute", streamed=(2, 3))
    model(**make_micro_batch("t2v", torch.float32, 0)).sample.sum().backward()
    for found in (model.state_dict(), model.to("cpu").state_dict()):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_the_midst_of_a_step_streamed_weights_are_not_touched():
    """Other threads run blocks with them."""
    model = make_wan("t2v", torch.float32)
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(3)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float32), batches)
    pipeline = Pipeline(model, ["cpu", "cpu"], residency="recompute", streamed=(2, 3))

    def loss(output, batch):
        model.to("cpu")
        with pytest.raises(RuntimeError, match="streamed in the midst of a Pipeline's step"):
            model.state_dict()
        return square_loss(output, batch)

    torch.testing.assert_close(list(pipeline.step(batches, loss).losses), losses)
    assert_close(gradients(model), expected, 1e-5)
    assert model.state_dict().keys() == make_wan("t2v", torch.float32).state_dict().keys()


def test_a_model_that_checkpoints_blocks_whose_weights_are_streamed_is_refused():
    """What it runs again would have another block's weights."""
    model = make_wan("t2v", torch.float32)
    split(model, ["cpu", "cpu"], residency="recompute", streamed=(2, 3))
    model.enable_gradient_checkpointing()
    model.train()
    with pytest.raises(RuntimeError, match=r"blocks\.\d has its weights streamed .* checkpointing off"):
        model(**make_micro_batch("t2v", torch.float32, 0)).sample.sum().backward()


def test_more_than_host_memory_may_hold_is_refused_before_anything_is_moved():
    model, limit = make_wan("t2v", torch.float32), 1000
    message = r"streamed=\[1, 2\]: these blocks' weights take .* of host memory, and 0\.0 GiB may be taken"
    with pytest.raises(ValueError, match=message):
        split(model, ["cpu", "cpu"], residency="recompute", streamed=(1, 2), host_limit=limit)
    split(model, ["cpu", "cpu"], residency="recompute", host_limit=limit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streamed": (1,)}, "2 stages need as many numbers"),
        ({"streamed": (9, 0)}, "stage 0 has"),
        ({"streamed": (1, 0), "residency": "keep"}, "cannot be 'keep'"),
        ({"residency": ["keep"]}, "1 residencies for 5 blocks"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        split(make_wan("t2v", torch.float32), ["cpu", "cpu"], **{"residency": "recompute", **options})
