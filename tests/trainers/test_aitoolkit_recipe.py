"""The page's recipe for ai-toolkit, on a stand-in with its LoRA mechanism and checkpoints around blocks."""

from __future__ import annotations

import pytest
import stand_ins
import torch
from accelerate import Accelerator


def train(split: bool, checkpointing: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As its process: load, move, build and place the network, prepare both, move again, train."""
    accelerator = Accelerator(cpu=True)
    transformer = stand_ins.Flux2(checkpointing)
    if split:
        edit, _ = stand_ins.example("flux2_model.py").split("# toolkit/network_mixins.py")
        exec(edit, {"transformer": transformer})
    transformer.to("cpu", dtype=torch.float32)
    transformer.requires_grad_(False)
    network = stand_ins.Network(transformer)
    network.to("cpu", torch.float32)
    transformer, network = accelerator.prepare(transformer, network)
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters(), 1e-2))
    transformer.to("cpu").train()
    losses = []
    for batch in stand_ins.batches(4):
        pred = transformer(
            x=batch["latents"] + batch["noise"], timesteps=torch.tensor([0.5]), ctx=batch["ctx"]
        )
        loss = (pred - (batch["noise"] - batch["latents"])).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("checkpointing", ["", "outside"])
def test_losses_and_trained_lora_are_those_of_the_unsplit_trainer(checkpointing):
    theirs, their_lora = train(False, checkpointing)
    ours, lora = train(True, checkpointing)
    stand_ins.assert_same(ours, theirs)
    stand_ins.assert_same(lora, their_lora)
