"""FLUX.2's two vocabularies, against diffusers' own conversion of the authors' weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from tworeel.models.flux2.lora_names import SWAPPED, from_native, native_parts, to_native

SIZES = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "in_channels": 8,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The linear layers' weights of a tiny FLUX.2, by the layer's name."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**SIZES)
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_the_authors_weights_become_diffusers_by_our_names_and_row_order(weights: dict[str, Tensor]) -> None:
    native: dict[str, Tensor] = {}
    for name in dict.fromkeys(map(to_native, weights)):
        rows = torch.cat([weights[part] for part in native_parts(name)])
        swapped = native_parts(name)[0] in SWAPPED
        native[f"{name}.weight"] = torch.cat(rows.chunk(2)[::-1]) if swapped else rows
    assert len(native) == 2 * 8 + 3 * 2 + 11
    converted = convert_flux2_transformer_checkpoint_to_diffusers(native)
    assert converted.keys() == {f"{name}.weight" for name in weights}
    assert all(torch.equal(converted[f"{name}.weight"], weight) for name, weight in weights.items())


def test_every_layer_leads_to_a_native_one_and_back(weights: dict[str, Tensor]) -> None:
    for name in weights:
        native = to_native(name)
        assert native != name and to_native(native) == native
        assert name in native_parts(native)
        assert from_native(native) == native_parts(native)[0]
        assert from_native(name) == name


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn.q", "single_blocks.1.linear3", "blocks.0.attn1.to_q", "linear1", ""]
)
def test_unknown_names_stay_as_they_are(name: str) -> None:
    assert native_parts(name) == ()
    assert from_native(name) == to_native(name) == name
