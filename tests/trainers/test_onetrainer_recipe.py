"""The page's recipe for OneTrainer: diffusers' model class, and stand-ins for its LoRA and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stand_ins
import torch
from test_diffusers_loop import batches, make
from torch import Tensor, nn


class CheckpointLayer(nn.Module):
    """Takes a block's place by its forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.orig_forward = block.forward
        block.forward = self.forward

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.utils.checkpoint.checkpoint(self.orig_forward, *args, use_reentrant=False, **kwargs)


def split(transformer: nn.Module) -> None:
    exec(stand_ins.example("BaseFlux2Setup"), {"model": SimpleNamespace(transformer=transformer)})


def train(splits: bool, choose) -> tuple[list[Tensor], list[Tensor]]:
    """As its trainer: optimizations, device, LoRA; both are moved again before training."""
    transformer = make()
    if splits:
        split(transformer)
    transformer.to(device="cpu")
    network = stand_ins.Network(transformer, choose)
    transformer.to(device="cpu").train()
    network.to("cpu")
    optimizer, losses = torch.optim.AdamW(network.parameters(), 1e-2), []
    for batch in batches(4):
        pred = transformer(**batch["inputs"], return_dict=True).sample
        loss = (pred - batch["target"]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("choose", [lambda name: "transformer_block" in name, lambda name: True])
def test_losses_and_trained_lora_are_those_of_the_unsplit_trainer(choose):
    theirs, their_lora = train(False, choose)
    ours, lora = train(True, choose)
    stand_ins.assert_same(ours, theirs)
    stand_ins.assert_same(lora, their_lora)


def test_its_own_checkpoints_are_refused_with_the_message_of_the_page():
    transformer = make()
    CheckpointLayer(transformer.transformer_blocks[0])
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the page has the message
        split(transformer)
    page = " ".join(stand_ins.PAGE.read_text(encoding="utf-8").split())
    assert str(caught.value) in page
