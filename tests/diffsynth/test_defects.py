"""Defects of DiffSynth that change results, and what becomes of them here.

These fail when DiffSynth repairs them: then what we do about them can go.
"""

from __future__ import annotations

import pytest
import torch
from test_diffsynth_variants import assert_alike, gradients_of, inputs_of, loss_of, made
from torch import nn
from variants import basic, model_function, wan

import tworeel
from tworeel.demo.tiny_flux2_encoders import tiny_text_model
from tworeel.diffsynth.package import mend_mistral

pytestmark = pytest.mark.usefixtures("diffsynth_package")


def test_s2v_with_diffsynths_own_checkpointing_fails_on_the_write_to_its_input() -> None:
    """test_diffsynth_variants.py shows that ours has the gradients of S2V without checkpointing."""
    toy = made("s2v")
    output = model_function("s2v")(**toy.models, **inputs_of(toy), use_gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(output).backward()


def test_s2v_with_diffsynths_own_offloaded_checkpointing_has_wrong_gradients() -> None:
    """Its block number is read when the block is computed again: by then it is that of the last block."""
    gradients = []
    for offload in (False, True):
        toy = made("s2v")
        output = model_function("s2v")(
            **toy.models, **inputs_of(toy), use_gradient_checkpointing_offload=offload
        )
        loss_of(output).backward()
        gradients.append(gradients_of(toy.models))
    with pytest.raises(AssertionError):
        assert_alike(gradients[1], gradients[0])


def test_a_wan_transformer_in_diffsynths_fp8_gives_its_lora_no_gradient() -> None:
    """`--fp8_models` wraps its blocks, which compute with a copy of themselves, LoRA and all."""
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.diffusion.training_module import DiffusionTrainingModule
    from diffsynth.models.model_loader import ModelPool

    module, name = DiffusionTrainingModule(), "diffsynth.models.wan_video_dit.WanModel"
    how = module.parse_vram_config(fp8=True, device="cpu")
    kinds = ModelPool().fetch_module_map(name, how)
    dit = enable_vram_management(wan().requires_grad_(False), kinds, vram_config=how, vram_limit=None)
    module.add_lora_to_model(dit, ["q", "v"], lora_rank=2)
    inputs = {key: value.to(torch.bfloat16) for key, value in basic().items()}
    inputs["latents"].requires_grad_()  # else nothing at all would have a gradient
    loss_of(model_function("t2v")(dit=dit, **inputs)).backward()
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    assert len(trained) > 20 and all(parameter.grad is None for parameter in trained)


def test_diffsynths_mistral_fails_with_transformers_5_and_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth.models.flux2_text_encoder import Flux2TextEncoder

    monkeypatch.setattr(Flux2TextEncoder, "forward", Flux2TextEncoder.forward)  # put back afterwards
    whole = tiny_text_model("mistral3")
    encoder = tiny_text_model("mistral3")
    encoder.__class__ = Flux2TextEncoder
    ids = torch.arange(6)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    with pytest.raises(TypeError, match="positional arguments"):
        encoder(**given, use_cache=False)
    mend_mistral()
    mend_mistral()  # a second time changes nothing
    theirs, ours = (model(**given, use_cache=False).hidden_states[30] for model in (whole, encoder))
    assert torch.equal(theirs, ours)


def test_the_forward_of_wans_transformer_is_broken_and_training_does_not_use_it() -> None:
    """Issue 1063 there: it takes two results of `patchify`, which returns one."""
    dit = wan()
    given = basic()
    with pytest.raises((ValueError, TypeError)):
        dit(given["latents"], given["timestep"], given["context"])
    output = model_function("t2v")(dit=dit, **given)
    assert output.shape == given["latents"].shape


def test_split_alone_serves_the_transformer_through_its_model_function() -> None:
    torch.manual_seed(0)
    dit, given = wan(), basic()
    expected = model_function("t2v")(dit=dit, **given)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit = dit

        def forward(self, **inputs: object) -> torch.Tensor:
            return model_function("t2v")(dit=self.dit, **inputs)

    model = Model()
    tworeel.split(model, ["cpu", "cpu"])
    assert torch.equal(model(**given), expected)
