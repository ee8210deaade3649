"""How the forms spell a LoRA, and what the reader understands."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_samples import random_lora
from torch import nn

from tworeel.errors import UserError
from tworeel.lora.formats import FORMS, from_tensors, to_tensors
from tworeel.lora.scaling import ALPHA_NOTE

SIXTEEN = torch.tensor(16.0)


def keys_of(name, naming, lora):
    return set(to_tensors(lora, FORMS[name], naming)[0])


def test_the_keys_are_those_of_the_tools(naming):
    lora = random_lora(0, alphas=(SIXTEEN,), dora=True)
    plain = random_lora(0, alphas=(SIXTEEN,))
    assert {
        "diffusion_model.blocks.1.self_attn.o.lora_A.weight",
        "diffusion_model.blocks.1.self_attn.o.lora_B.weight",
        "diffusion_model.blocks.1.self_attn.o.alpha",
        "diffusion_model.blocks.1.self_attn.o.dora_scale",
    } <= keys_of("comfyui", naming, lora)
    assert {
        "transformer.blocks.1.attn1.to_out.0.lora_A.weight",
        "transformer.blocks.1.attn1.to_out.0.lora_B.weight",
        "transformer.blocks.1.attn1.to_out.0.lora_magnitude_vector",
    } <= keys_of("diffusers", naming, lora)
    assert {
        "blocks.0.ffn.0.lora_A.default.weight",
        "blocks.0.ffn.0.lora_B.default.weight",
    } <= keys_of("diffsynth", naming, plain)
    assert {
        "lora_unet_blocks_0_cross_attn_k.lora_down.weight",
        "lora_unet_blocks_0_cross_attn_k.lora_up.weight",
        "lora_unet_blocks_0_cross_attn_k.alpha",
    } <= keys_of("kohya", naming, lora)


def test_diffusers_keys_all_hold_lora(naming):
    assert all("lora" in key for key in keys_of("diffusers", naming, random_lora(0, alphas=(SIXTEEN,))))


def test_shapes_are_lora_rows_and_dora_columns(naming):
    tensors, _ = to_tensors(random_lora(0, alphas=(SIXTEEN,), dora=True), FORMS["comfyui"], naming)
    assert tensors["diffusion_model.blocks.0.ffn.0.lora_A.weight"].shape == (4, 256)
    assert tensors["diffusion_model.blocks.0.ffn.0.lora_B.weight"].shape == (320, 4)
    assert tensors["diffusion_model.blocks.0.ffn.0.dora_scale"].shape == (320, 1)
    assert tensors["diffusion_model.blocks.0.ffn.0.alpha"].shape == ()


def test_every_linear_layer_of_wan_has_a_kohya_name_that_leads_back(naming):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=12, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 12 * 12 + 8
    form = FORMS["kohya"]
    for name in linears:
        stem = form.stem(name, naming).removeprefix(form.prefix)
        assert "." not in stem
        assert naming.from_native(naming.dotted(stem)) == name


def respelled(tensors, *changes):
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in changes:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("comfyui", [(r"^diffusion_model\.", "model.diffusion_model.")]),
        ("comfyui", [(r"^diffusion_model\.", "")]),
        ("comfyui", [(r"lora_A", "lora_down"), (r"lora_B", "lora_up")]),
        ("comfyui", [(r"(lora_[AB])", r"\1.default")]),
        ("diffusers", [(r"^transformer\.", "")]),
        ("diffusers", [(r"^transformer\.", "base_model.model.")]),
        (
            "diffusers",
            [(r"^transformer\.", "base_model.model.transformer."), (r"(lora_[AB])", r"\1.my_lora")],
        ),
        ("diffusers", [(r"^transformer\.", "diffusion_model.")]),
        ("diffsynth", [(r"\.default", "")]),
        ("kohya", [(r"lora_down", "lora_A"), (r"lora_up", "lora_B")]),
    ],
)
def test_other_spellings_are_read_alike(naming, form, changes):
    lora = random_lora(1)
    tensors, metadata = to_tensors(lora, FORMS[form], naming)
    read = from_tensors(respelled(tensors, *changes), metadata, naming)
    assert read.modules.keys() == lora.modules.keys()
    for name, part in lora.modules.items():
        assert torch.equal(read.modules[name].down, part.down) and torch.equal(read.modules[name].up, part.up)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_alpha_means_the_rank(naming, form):
    tensors, metadata = to_tensors(random_lora(2, ranks=(4, 2)), FORMS[form], naming)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    assert all(part.scale == 1 for part in from_tensors(tensors, metadata, naming).modules.values())


@pytest.mark.parametrize(
    ("alpha", "multiplied"), [(1.0, True), (2.0, True), (16.0, True), (3.0, False), (0.7, False)]
)
def test_diffsynth_gets_the_right_scale_by_its_own_rule(naming, alpha, multiplied):
    """DiffSynth adds up @ down, times alpha / rank where an alpha tensor stands beside them."""
    lora = random_lora(3, alphas=(torch.tensor(alpha),))
    tensors, _ = to_tensors(lora, FORMS["diffsynth"], naming)
    for name, part in lora.modules.items():
        stem = naming.to_native(name)
        up, down = tensors[f"{stem}.lora_B.default.weight"], tensors[f"{stem}.lora_A.default.weight"]
        kept = tensors.get(f"{stem}.alpha")
        assert (kept is None) == multiplied
        scale = 1.0 if kept is None else kept / down.shape[0]
        torch.testing.assert_close(up @ down * scale, part.scale * part.up @ part.down)


def test_half_precision_values_that_would_underflow_are_not_multiplied(naming):
    lora = random_lora(4, alphas=(torch.tensor(1.0),), dtype=torch.float16)
    next(iter(lora.modules.values())).up[0, 0] = 6e-8
    tensors, metadata = to_tensors(lora, FORMS["diffsynth"], naming)
    assert "blocks.0.self_attn.q.alpha" in tensors and "blocks.0.self_attn.k.alpha" not in tensors
    read = from_tensors(tensors, metadata, naming)
    assert all(torch.equal(read.modules[name].up, part.up) for name, part in lora.modules.items())


def test_dora_is_refused_where_it_has_no_place(naming):
    with pytest.raises(UserError, match="'diffsynth' cannot hold DoRA's magnitudes; allowed are comfyui"):
        to_tensors(random_lora(0, dora=True), FORMS["diffsynth"], naming)


def test_pefts_configuration_is_honoured(naming):
    tensors, _ = to_tensors(random_lora(5), FORMS["diffusers"], naming)
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 6}, "use_rslora": False}
    read = from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)}, naming)
    assert read.modules["blocks.1.attn1.to_q"].scale == 1.5
    assert read.modules["blocks.1.attn2.to_q"].scale == 2.0
    config = {f"transformer.{key}": value for key, value in (config | {"use_rslora": True}).items()}
    read = from_tensors(tensors, {"lora_adapter_metadata": json.dumps(config)}, naming)
    assert read.modules["blocks.1.attn2.to_q"].scale == 4.0


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"lora_alpha": "much"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}']
)
def test_a_damaged_configuration_is_refused(naming, text):
    tensors, _ = to_tensors(random_lora(5), FORMS["diffusers"], naming)
    with pytest.raises(UserError, match="lora_adapter_metadata"):
        from_tensors(tensors, {"lora_adapter_metadata": text}, naming)


def test_a_note_that_no_longer_fits_is_void(naming):
    tensors, metadata = to_tensors(
        random_lora(6, alphas=(torch.tensor(8, dtype=torch.float16),)), FORMS["diffusers"], naming
    )
    assert ALPHA_NOTE in metadata
    changed = metadata | {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 2})}
    assert {part.alpha_value for part in from_tensors(tensors, changed, naming).modules.values()} == {2.0}
    with pytest.raises(UserError, match="damaged"):
        from_tensors(tensors, metadata | {ALPHA_NOTE: '[{"alpha": [1, "float128", []]}]'}, naming)


def only(condition):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if condition(key)}


def plus(key, *shape):
    return lambda tensors: tensors | {key: torch.zeros(shape)}


def each(part, change):
    return lambda tensors: {key: change(tensor) if part in key else tensor for key, tensor in tensors.items()}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)},
            "not a LoRA: it has no keys like",
        ),
        (lambda tensors: {}, "not a LoRA"),
        (plus("diffusion_model.blocks.0.norm3.diff", 2), r"no part of a LoRA .*norm3\.diff"),
        (plus("diffusion_model.blocks.0.self_attn.q.lora_up.weight", 2, 2), "same twice"),
        (only(lambda key: "0.ffn.2.lora_B" not in key), r"blocks\.0\.ffn\.net\.2: B \(lora_up\) missing"),
        (each("lora_B", lambda tensor: tensor[:, :2]), "do not fit a linear layer"),
        (each("lora_", lambda tensor: tensor[..., None, None]), "do not fit a linear layer"),
        (each("alpha", lambda tensor: tensor * torch.nan), "alpha must be one number above 0"),
        (plus("diffusion_model.blocks.0.ffn.0.dora_scale", 1, 256), r"magnitude has shape \(1, 256\)"),
        (renamed("self_attn", "attention"), "these are no layers of the model"),
        (renamed("diffusion_model", "transformer_2"), "these are no layers of the model"),
        (plus("lora_te_text_model.alpha"), "these are no layers of the model: 'lora_te_text_model'"),
    ],
)
def test_what_is_no_lora_of_the_family_is_refused_in_words(naming, change, message):
    tensors, metadata = to_tensors(random_lora(7, alphas=(SIXTEEN,)), FORMS["comfyui"], naming)
    with pytest.raises(UserError, match=message):
        from_tensors(change(tensors), metadata, naming)
