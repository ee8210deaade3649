"""Names go both ways, and agree with diffusers' own conversion."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tworeel.models.wan.keys import from_native, is_native_key, parameter_name, to_native

IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 256}
STRUCTURES = {
    "t2v": {"in_channels": 16},
    "i2v": {"in_channels": 36, **IMAGE},
    "flf2v": {"in_channels": 36, "pos_embed_seq_len": 514, **IMAGE},
    "a14b_i2v": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}


def build(structure: str) -> torch.nn.Module:
    with init_empty_weights():
        return WanTransformer3DModel(num_attention_heads=2, num_layers=11, **STRUCTURES[structure])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_parameter_and_module_name_survives_the_round_trip(structure):
    model = build(structure)
    names = [*model.state_dict(), *(name for name, _ in model.named_modules() if name)]

    natives = [to_native(name) for name in names]

    assert [from_native(native) for native in natives] == names
    assert len(set(natives)) == len(names)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_native_names_are_those_that_diffusers_converts_from(structure):
    names = [name for name in build(structure).state_dict() if not name.endswith("pos_embed")]
    state = {to_native(name): torch.empty(0) for name in names}

    # diffusers has no entry for FLF2V's position embedding, which is why it is left out here.
    assert list(convert_wan_transformer_to_diffusers(state)) == names


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_single_files_are_read_in_either_spelling_with_any_prefix(structure, prefix):
    for name in build(structure).state_dict():
        assert parameter_name("comfyui", prefix + to_native(name)) == name
        assert parameter_name("comfyui", prefix + name) == name
        assert parameter_name("native", to_native(name)) == name
        assert parameter_name("diffusers", name) == name


@pytest.mark.parametrize(
    ("native", "ours"),
    [
        ("blocks.7.cross_attn.k_img", "blocks.7.attn2.add_k_proj"),
        ("blocks.7.self_attn.o.lora_A.weight", "blocks.7.attn1.to_out.0.lora_A.weight"),
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.7.modulation", "blocks.7.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ],
)
def test_names_that_are_easily_confused(native, ours):
    assert from_native(native) == ours
    assert to_native(ours) == native


def test_a_norm_that_no_layer_uses_is_left_out():
    assert parameter_name("diffusers", "blocks.0.attn2.norm_added_q.weight") is None


def test_native_keys_are_told_from_those_of_diffusers():
    names = list(build("flf2v").state_dict())

    assert not any(map(is_native_key, names))
    assert all(is_native_key(to_native(name)) == (to_native(name) != name) for name in names)


def test_unknown_keys_stay_as_they_are():
    assert parameter_name("comfyui", "something.else.weight") == "something.else.weight"
