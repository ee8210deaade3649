"""The loop of diffusers' FLUX.2 script, with its real parts: split, and as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import stand_ins
import torch
from accelerate import Accelerator
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

import tworeel
from tworeel.engine.split import find_split


def make() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    ).requires_grad_(False)


def with_lora(transformer: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_out.0", "to_qkv_mlp_proj"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return transformer


def batches(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "inputs": {
                "hidden_states": randn(1, 6, 8),
                "encoder_hidden_states": randn(1, 5, 12),
                "timestep": torch.tensor([0.1 + n / 10]),
                "guidance": torch.ones(1),
                "img_ids": torch.arange(24).reshape(1, 6, 4) % 4,
                "txt_ids": torch.arange(20).reshape(1, 5, 4) % 4,
            },
            "target": randn(1, 6, 8),
        }
        for n in range(count)
    ]


def prepared(split: bool, accelerator: Accelerator) -> tuple[Flux2Transformer2DModel, torch.optim.Optimizer]:
    transformer = make()
    if split:
        names = {"transformer": transformer, "weight_dtype": torch.float32, "tworeel": tworeel}
        exec(stand_ins.example("weight_dtype"), names)
    transformer.enable_gradient_checkpointing()
    with_lora(transformer)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    transformer, optimizer = accelerator.prepare(transformer, torch.optim.AdamW(trained, 1e-2))
    transformer.train()
    return transformer, optimizer


def train(split: bool, accelerator: Accelerator) -> tuple[list[Tensor], Flux2Transformer2DModel]:
    transformer, optimizer = prepared(split, accelerator)
    losses = []
    for batch in batches(4):
        with accelerator.accumulate(transformer):
            pred = transformer(**batch["inputs"], return_dict=False)[0]
            loss = (pred.float() - batch["target"]).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    return losses, transformer


def lora_of(transformer: torch.nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in get_peft_model_state_dict(transformer).values()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_and_trained_lora_are_those_of_the_unsplit_script(precision):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    theirs, their_model = train(False, accelerator)
    ours, model = train(True, accelerator)
    stand_ins.assert_same(ours, theirs)
    stand_ins.assert_same(lora_of(accelerator.unwrap_model(model)), lora_of(their_model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_pipeline_in_its_place_gives_the_same_gradients(precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    theirs, _ = prepared(False, accelerator)
    micro_batches, losses = batches(4), []
    for batch in micro_batches:
        pred = theirs(**batch["inputs"], return_dict=False)[0]
        loss = (pred.float() - batch["target"]).square().mean() / 4
        accelerator.backward(loss)
        losses.append(loss.detach())
    model, _ = prepared(True, accelerator)
    names = {"transformer": model, "micro_batches": micro_batches, "tworeel": tworeel}
    exec(stand_ins.example("def loss(output, batch)"), names)
    stand_ins.assert_same(list(names["result"].losses), losses)
    pairs = zip(model.parameters(), theirs.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    stand_ins.assert_same([a for a, _ in grads], [b for _, b in grads])


def test_accelerate_leaves_a_split_model_where_it_is_and_unwraps_it(tmp_path: Path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    transformer = make()
    assert not accelerator.verify_device_map(transformer)
    division = tworeel.split(transformer, ["cpu", "cpu"])
    assert accelerator.verify_device_map(transformer)
    transformer = accelerator.prepare(with_lora(transformer))
    assert find_split(transformer) is division
    accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)
    unwrapped = accelerator.unwrap_model(transformer, keep_fp32_wrapper=False)
    assert unwrapped(**batches(1)[0]["inputs"]).sample.dtype == torch.float32
    assert find_split(unwrapped) is division
    division.remove()
    assert not accelerator.verify_device_map(transformer)
