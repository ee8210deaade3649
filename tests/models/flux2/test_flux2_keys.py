"""Names and forms in the authors' files, held against diffusers' own conversion."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file

from tworeel.demo.tiny_flux2 import tiny_transformer, write_transformer
from tworeel.models.flux2.keys import parameter_name, strip_prefix
from tworeel.weights.rows import rows_of

VARIANTS = ("flux2-dev", "flux2-klein-4b")


def converted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters that our names and rows make of a file's tensors."""
    found = {}
    for key, tensor in tensors.items():
        for rows in rows_of(parameter_name("comfyui", key)):
            ranges = rows.ranges(tuple(tensor.shape)) or ((0, tensor.shape[0]),)
            found[rows.name] = torch.cat([tensor[first:end] for first, end in ranges])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_with_the_authors_names_is_converted_as_diffusers_converts_it(tmp_path, variant):
    tensors = load_file(write_transformer(tmp_path, variant=variant, layout="native", dtype=torch.float32))

    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    ours = converted(tensors)
    assert set(ours) == set(theirs) == set(tiny_transformer(variant).state_dict())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_file_on_disk_has_the_authors_keys_and_shapes(tmp_path):
    path = write_transformer(tmp_path, variant="flux2-dev", layout="comfyui", prefix="model.diffusion_model.")
    shapes = {strip_prefix(key): tuple(tensor.shape) for key, tensor in load_file(path).items()}

    assert shapes["double_blocks.1.img_attn.qkv.weight"] == (96, 32)
    assert shapes["double_blocks.1.txt_attn.norm.key_norm.scale"] == (16,)
    assert shapes["single_blocks.2.linear1.weight"] == (3 * 32 + 6 * 32, 32)
    assert shapes["single_blocks.2.norm.query_norm.scale"] == (16,)
    assert {"guidance_in.in_layer.weight", "final_layer.adaLN_modulation.1.weight", "img_in.weight"} <= set(
        shapes
    )
