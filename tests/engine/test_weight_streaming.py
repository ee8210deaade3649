"""Frozen weights that wait in host memory give the same step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine.weight_streaming import SLOTS, WeightStreamer, spread

CPU = torch.device("cpu")


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


def test_trained_parameters_stay_on_the_device():
    model = make_wan("t2v", torch.float32)
    division = split(model, ["cpu"], residency="recompute", streamed=(5,))
    frozen = sum(p.nbytes for b in model.blocks for p in b.parameters() if not p.requires_grad)
    assert frozen <= division.streamed_bytes < 1.5 * frozen + 5 * 100 * 256


def test_streamed_blocks_are_spread_evenly():
    assert spread(range(20), 4) == [2, 7, 12, 17]
    assert spread(range(10, 13), 3) == [10, 11, 12]
    assert spread(range(5), 0) == []


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


def assert_streamed_equals_plain(model: nn.Module, residency: str) -> None:
    """A step with all weights streamed gives each of six blocks the gradient of the plain model."""
    plain = copy.deepcopy(model)
    batches = [(torch.randn(3, 8), torch.randn(3, 8)) for _ in range(3)]
    for batch in batches:
        plain(*batch).square().sum().backward()
    pipeline = Pipeline(model, ["cpu", "cpu"], residency=residency, streamed=(3, 3))
    pipeline.step(batches, lambda output, _: output.square().sum())
    for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
        torch.testing.assert_close(ours.scale.grad, theirs.scale.grad)


class TwoStreams(nn.Module):
    """A block of two hidden states, as FLUX.2's double blocks are; which one autograd takes first differs."""

    def __init__(self, *, text_last: bool) -> None:
        super().__init__()
        self.to_image, self.to_text = (nn.Linear(8, 8).requires_grad_(False) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(8))
        self._text_last = text_last

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(image, text), each of shape (L, 8)."""
        made = {}
        for name in ("image", "text") if self._text_last else ("text", "image"):
            if name == "text":
                made[name] = text + self.to_text(torch.tanh(text * self.scale) + image.mean())
            else:
                made[name] = image + self.to_image(image + text.mean()) * self.scale
        return made["image"], made["text"]


@pytest.mark.parametrize("text_last", [False, True])
@pytest.mark.parametrize("only_text", [False, True])
@pytest.mark.parametrize("residency", ["recompute", "selective"])
def test_blocks_of_two_hidden_states_have_their_weights_too(text_last, only_text, residency):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TwoStreams(text_last=text_last) for _ in range(6))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for block in self.blocks:
                image, text = block(image, text)
            return text if only_text else torch.cat([image, text])

    torch.manual_seed(0)
    assert_streamed_equals_plain(Model(), residency)


def test_a_block_that_hands_an_input_through_has_its_weights():
    class HandsThrough(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8).requires_grad_(False)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return image + self.linear(torch.tanh(image * self.scale) + text.mean()), text

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(HandsThrough() for _ in range(6))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            text = self.embed(text)
            for block in self.blocks:
                image, text = block(image, text)
            return torch.cat([image, text])

    torch.manual_seed(0)
    assert_streamed_equals_plain(Model(), "recompute")
