"""What happens around a block's forward and backward: its weights have to be there for both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tworeel import Pipeline
from tworeel.engine.run_ahead import RunAhead


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


def test_a_block_of_two_outputs_is_queued_once_each_way(monkeypatch):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TwoStreams(text_last=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for block in self.blocks:
                x, y = block(x, y)
            return x + y

    queued = []
    monkeypatch.setattr(RunAhead, "block_queued", lambda _, device: queued.append(device))
    Pipeline(Model(), ["cpu", "cpu"]).step([torch.randn(3, 8)], lambda output, _: output.sum())
    assert len(queued) == 2 * 4


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
