"""Each layout loads to the same transformer, which is the one that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import nn

from tworeel.demo.tiny_flux2 import tiny_transformer, write_transformer
from tworeel.errors import UserError
from tworeel.lora.targets import find_targets
from tworeel.models.family import Component
from tworeel.models.flux2.folders import find_transformer, shapes_of
from tworeel.models.flux2.keys import parameter_name
from tworeel.models.flux2.transformer import BLOCK_LISTS, LORA_PRESETS, build_transformer
from tworeel.models.flux2.variants import transformer_config
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles

LAYOUTS = ("diffusers", "native", "comfyui")
VARIANTS = ("flux2-dev", "flux2-klein-4b")
CPU = torch.device("cpu")


def component_at(path: Path) -> Component:
    found = find_transformer(path)
    assert found is not None
    with TensorFiles(*found.files) as files:
        config = transformer_config(shapes_of(files, found.layout), found.config)
    return Component(files=found.files, layout=found.layout, config=config)


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    component = component_at(path)
    model = build_transformer(component)
    load_weights(
        model,
        TensorFiles(*component.files),
        lambda key: parameter_name(component.layout, key),
        device_of=lambda name: CPU,
        dtype_of=lambda name: dtype,
    )
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_layouts_load_to_bitwise_the_same_transformer(tmp_path, variant):
    loaded = [
        load(write_transformer(tmp_path / layout, variant=variant, layout=layout)) for layout in LAYOUTS
    ]

    assert all(same(loaded[0], other) for other in loaded[1:])
    reference = Flux2Transformer2DModel.from_pretrained(
        tmp_path / "diffusers" / "transformer", torch_dtype=torch.float32
    )
    assert same(loaded[0], reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_from_shapes_is_the_one_that_was_written(tmp_path, variant):
    written = tiny_transformer(variant).config
    config = component_at(write_transformer(tmp_path, variant=variant, layout="comfyui")).config

    assert {key: written[key] for key in config} == {**config, "out_channels": None}


def test_an_outputs_is_that_of_the_model_it_was_written_from(tmp_path):
    model = load(write_transformer(tmp_path, variant="flux2-dev", layout="native", dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 6, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 96, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(1, 6, 4),
        "txt_ids": torch.zeros(1, 5, 4),
    }
    ours, theirs = (each(**inputs, return_dict=False)[0] for each in (model, tiny_transformer("flux2-dev")))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_fp8_scaled_files_dequantize_to_weight_times_scale(tmp_path, prefix):
    path = write_transformer(tmp_path, layout="comfyui", fp8_scaled=True, prefix=prefix)
    stored = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()}
    model = load(path)

    fused = stored["double_blocks.0.img_attn.qkv.weight"].float()
    fused *= stored["double_blocks.0.img_attn.qkv.weight_scale"]
    attention = model.transformer_blocks[0].attn
    ours = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    assert torch.equal(ours, fused)
    single = stored["single_blocks.1.linear1.weight"].float() * stored["single_blocks.1.linear1.weight_scale"]
    assert torch.equal(model.single_transformer_blocks[1].attn.to_qkv_mlp_proj.weight, single)


def test_a_fused_layer_of_another_size_is_named(tmp_path):
    component = component_at(write_transformer(tmp_path, layout="native"))
    wider = Component(
        files=component.files, layout="native", config={**component.config, "num_attention_heads": 3}
    )
    with pytest.raises(UserError) as caught:
        load_weights(
            build_transformer(wider),
            TensorFiles(*wider.files),
            lambda key: parameter_name("native", key),
            device_of=lambda name: CPU,
            dtype_of=lambda name: torch.float32,
        )
    assert "of the wrong shape" in str(caught.value)


def test_lora_presets_name_the_linear_layers_of_both_kinds_of_blocks():
    model = tiny_transformer("flux2-klein-4b")
    found = {name: find_targets(model, preset, BLOCK_LISTS) for name, preset in LORA_PRESETS.items()}

    assert {name: len(targets) for name, targets in found.items()} == {
        "attention": 2 * 8 + 3 * 2,
        "all-linear": 2 * 12 + 3 * 2,
    }
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert set(found["all-linear"]) == {name for name in linears if name.startswith(BLOCK_LISTS)}
    assert "single_transformer_blocks.2.attn.to_out" in found["attention"]
