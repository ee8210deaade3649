"""The structure of a header tells the variant."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from tworeel.errors import UserError
from tworeel.models.wan.variants import (
    expert_in_name,
    is_wan,
    traits,
    transformer_config,
    unsupported_kind,
    variant_name,
)

LARGE = {"num_attention_heads": 40, "ffn_dim": 13824}
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960}
CLIP = {"image_dim": 1280, "added_kv_proj_dim": 5120}
VARIANTS = [
    ("wan2.1-t2v-1.3b", False, SMALL),
    ("wan2.1-t2v-14b", False, LARGE),
    ("wan2.2-t2v-a14b", True, LARGE),
    ("wan2.1-i2v-14b", False, {"in_channels": 36, **LARGE, **CLIP}),
    ("wan2.1-flf2v-14b", False, {"in_channels": 36, "pos_embed_seq_len": 514, **LARGE, **CLIP}),
    ("wan2.2-i2v-a14b", True, {"in_channels": 36, **LARGE}),
    (
        "wan2.2-ti2v-5b",
        False,
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336},
    ),
]


def header(**config: object) -> dict[str, tuple[int, ...]]:
    with init_empty_weights():
        model = WanTransformer3DModel(**{"num_layers": 2, **config})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("variant", "has_experts", "config"), VARIANTS)
def test_every_variant_is_recognized_and_rebuilt_from_its_shapes(variant, has_experts, config):
    shapes = header(**config)

    assert is_wan(shapes)
    assert unsupported_kind(shapes) is None
    assert variant_name(shapes, has_experts=has_experts) == variant
    assert header(**transformer_config(shapes, {})) == shapes


def test_an_authors_config_gives_the_heads_of_an_unusual_width():
    shapes = header(num_attention_heads=3, attention_head_dim=32, ffn_dim=64, text_dim=24)
    native = {"dim": 96, "num_heads": 3, "ffn_dim": 64, "num_layers": 2, "eps": 1e-5, "model_type": "t2v"}

    found = transformer_config(shapes, native)

    assert (found["num_attention_heads"], found["attention_head_dim"]) == (3, 32)
    assert (found["text_dim"], found["eps"]) == (24, 1e-5)
    with pytest.raises(UserError, match="width 96"):
        transformer_config(shapes, {})


def test_a_config_that_promises_more_layers_than_the_file_has_wins():
    assert transformer_config(header(), {"num_heads": 40, "dim": 5120, "num_layers": 40})["num_layers"] == 40


@pytest.mark.parametrize(
    ("extra", "channels", "kind"),
    [
        ("vace_blocks.0.proj_in.weight", 16, "VACE"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", 36, "Animate"),
        ("casual_audio_encoder.weights", 16, "S2V"),
        ("ref_conv.weight", 48, "Fun-Control"),
        (None, 52, "Fun-Control"),
        (None, 20, "20-channel"),
    ],
)
def test_kinds_that_are_not_supported_are_named(extra, channels, kind):
    shapes = header(in_channels=channels) | ({extra: (1,)} if extra else {})

    assert is_wan(shapes)
    assert unsupported_kind(shapes) == kind


def test_other_networks_are_not_wan():
    assert not is_wan({"double_blocks.0.img_attn.qkv.weight": (3, 3)})


def test_the_experts_share_the_noise_levels_at_the_authors_boundaries():
    t2v_high, t2v_low = (traits("wan2.2-t2v-a14b", expert).sigma_range for expert in ("high", "low"))
    i2v_high, i2v_low = (traits("wan2.2-i2v-a14b", expert).sigma_range for expert in ("high", "low"))

    assert t2v_high == (t2v_low[1], 1.0) and t2v_low[0] == 0.0
    assert t2v_low[1] == pytest.approx(0.87485, abs=1e-6)
    assert i2v_high == (i2v_low[1], 1.0) and i2v_low[0] == 0.0
    assert i2v_low[1] == pytest.approx(0.899664, abs=1e-6)


def test_traits_differ_where_the_vae_and_the_conditions_do():
    large, flf2v, t2v = (traits(f"wan2.{name}", None) for name in ("2-ti2v-5b", "1-flf2v-14b", "1-t2v-14b"))

    assert (large.frame_rate, large.spatial_multiple, large.tokens_per_pixel_area) == (24, 32, 1024)
    assert large.image_inputs == ("first_image",) and large.image_optional
    assert flf2v.image_inputs == ("first_image", "last_image") and not flf2v.image_optional
    assert (t2v.frame_rate, t2v.spatial_multiple, t2v.tokens_per_pixel_area) == (16, 16, 256)
    assert t2v.image_inputs == () and t2v.sigma_range == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled.safetensors", "low"),
        ("HighNoise.safetensors", "high"),
        ("low_noise_model", "low"),
        ("slowmotion_flowers.safetensors", None),
        ("high_and_low.safetensors", None),
    ],
)
def test_file_names_tell_the_expert(name, expert):
    assert expert_in_name(name) == expert
