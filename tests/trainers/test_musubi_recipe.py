"""The page's recipe for musubi-tuner, on a stand-in with its classes' call shapes and order of calls."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import stand_ins
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tworeel import Pipeline
from tworeel.engine.split import find_split


class Trainer:
    """As `NetworkTrainer`: load, build the network, prepare both, then one loss at a time."""

    def load_transformer(self, accelerator, args, dit_path, attn_mode, split_attn, loading_device, dtype):
        self.loaded_on = loading_device
        return stand_ins.Flux2("inside" if args.gradient_checkpointing else "").to(loading_device, dtype)

    def call_dit(
        self,
        args,
        accelerator,
        transformer,
        latents,
        batch,
        noise,
        noisy_model_input,
        timesteps,
        network_dtype,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        noisy_model_input = noisy_model_input.to(accelerator.device, network_dtype)
        if args.gradient_checkpointing:
            noisy_model_input.requires_grad_(True)
        ctx = batch["ctx"].to(accelerator.device, network_dtype)
        pred = transformer(x=noisy_model_input, timesteps=timesteps / 1000, ctx=ctx)
        return pred, noise - latents

    def call(self, args, accelerator, transformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As its loop calls it for a batch."""
        latents, noise = batch["latents"], batch["noise"]
        noisy, timesteps = (latents + noise) / 2, torch.tensor([500.0])
        return self.call_dit(
            args, accelerator, transformer, latents, batch, noise, noisy, timesteps, torch.float32
        )

    def train(self, args) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        transformer = self.load_transformer(accelerator, args, "", "torch", False, "cpu:0", torch.float32)
        transformer.eval().requires_grad_(False)
        network = stand_ins.Network(transformer)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        transformer = accelerator.prepare(transformer)
        network, optimizer = accelerator.prepare(network, optimizer)
        transformer.train()
        self.losses, self.transformer, self.network = [], transformer, network
        for batch in stand_ins.batches(4):
            with accelerator.accumulate(network):
                pred, target = self.call(args, accelerator, transformer, batch)
                loss = torch.nn.functional.mse_loss(pred, target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), 1.0)
                self.losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()


@pytest.fixture
def trainer_of_the_page(monkeypatch: pytest.MonkeyPatch):
    """What the page's block makes of the script, without running it."""
    script = ModuleType("musubi_tuner.flux_2_train_network")
    script.Flux2NetworkTrainer = Trainer
    script.main = lambda: None
    monkeypatch.setitem(sys.modules, "musubi_tuner", package := ModuleType("musubi_tuner"))
    monkeypatch.setitem(sys.modules, script.__name__, script)
    package.flux_2_train_network = script
    exec(stand_ins.example("musubi_tuner"), {"__name__": "__main__"})
    return script.Flux2NetworkTrainer()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_trained_lora_are_those_of_the_unsplit_trainer(trainer_of_the_page, checkpointing):
    args = SimpleNamespace(gradient_checkpointing=checkpointing)
    theirs = Trainer()
    theirs.train(args)
    trainer_of_the_page.train(args)
    assert trainer_of_the_page.loaded_on == "cpu"
    assert find_split(trainer_of_the_page.transformer).placement.num_stages == 2
    stand_ins.assert_same(trainer_of_the_page.losses, theirs.losses)
    ours = list(trainer_of_the_page.network.parameters())
    stand_ins.assert_same([p.detach() for p in ours], [p.detach() for p in theirs.network.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pipeline_over_its_micro_batches_gives_the_same_gradients(trainer_of_the_page, checkpointing):
    args = SimpleNamespace(gradient_checkpointing=checkpointing)
    trainer_of_the_page.train(args)
    trainer, accelerator = trainer_of_the_page, Accelerator(cpu=True)
    transformer, network = trainer.transformer, trainer.network

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return trainer.call(args, accelerator, model, batch)

    grads = []
    for together in (False, True):
        network.zero_grad()
        if together:
            pipeline = Pipeline(transformer, forward=forward)
            pipeline.step(stand_ins.batches(3), lambda output, _: torch.nn.functional.mse_loss(*output))
        else:
            for batch in stand_ins.batches(3):
                torch.nn.functional.mse_loss(*forward(transformer, batch)).backward()
        grads.append([parameter.grad.clone() for parameter in network.parameters()])
    stand_ins.assert_same(grads[1], grads[0])


def test_a_pipeline_says_which_option_names_modules_listed_behind_the_blocks():
    model = stand_ins.Flux2().requires_grad_(False)
    network = stand_ins.Network(model)
    pipeline = Pipeline(model, ["cpu", "cpu"])
    batch = {"x": torch.ones(1, 5, 8), "timesteps": torch.ones(1), "ctx": torch.ones(1, 3, 8)}
    with pytest.raises(RuntimeError, match=r"double_blocks.0 of stage 0 runs after .* first=\[...\]"):
        pipeline.step([batch], lambda output, _: output.sum())
    model(**batch).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
