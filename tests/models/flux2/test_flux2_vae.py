"""Latents are those of diffusers' pipeline, from each layout, with the encoding weights alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from safetensors.torch import load_file, save_file

from tworeel.demo.tiny_flux2 import tiny_vae, write_vae
from tworeel.errors import UserError
from tworeel.models.family import Component, ModelSource
from tworeel.models.flux2.encoders import Flux2LatentEncoder, latent_identity
from tworeel.models.flux2.vae import open_vae, vae_config, vae_parameter_name
from tworeel.models.flux2.variants import traits
from tworeel.models.network_files import read_json, weight_files
from tworeel.weights.tensor_files import TensorFiles

LAYOUTS = ("diffusers", "native", "comfyui")
CPU = torch.device("cpu")


def component_at(path) -> Component:
    if path.is_dir():
        config = read_json(path / "config.json")
        return Component(files=weight_files(path), layout="diffusers", config=config)
    return Component(files=(path,), layout="comfyui")


def image(height: int = 64, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def of_the_pipeline(pixels: torch.Tensor, vae: AutoencoderKLFlux2) -> torch.Tensor:
    """What the pipeline's own method makes of an image."""
    pipeline = SimpleNamespace(vae=vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    normalized = pixels[None].float() / 127.5 - 1
    return Flux2Pipeline._encode_vae_image(pipeline, normalized, generator=None)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_is_encoded_as_the_pipeline_encodes_it(tmp_path, layout):
    vae = open_vae(component_at(write_vae(tmp_path, layout)), CPU, torch.float32)

    latents = vae.encode(image())
    assert latents.shape == (16, 4, 3)
    assert torch.equal(latents, of_the_pipeline(image(), tiny_vae()))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_only_the_encoding_half_is_read(tmp_path, prefix):
    tensors = load_file(write_vae(tmp_path, "native"))
    half = {f"{prefix}{k}": v for k, v in tensors.items() if not k.startswith("decoder.")}
    save_file(half, tmp_path / "half.safetensors")

    vae = open_vae(component_at(tmp_path / "half.safetensors"), CPU, torch.float32)
    assert torch.equal(vae.encode(image()), of_the_pipeline(image(), tiny_vae()))


@pytest.mark.parametrize(
    ("half", "theirs"), [("encoder", ("decoder.", "post_quant")), ("decoder", ("encoder.", "quant"))]
)
def test_every_key_of_the_authors_file_is_a_parameter_of_diffusers(tmp_path, half, theirs):
    keys = load_file(write_vae(tmp_path, "native"))
    name_of = vae_parameter_name(keys, half)
    wanted = {name for name in tiny_vae().state_dict() if not name.startswith(theirs)}

    assert {name_of(key) for key in keys} - {None} == wanted - {"bn.num_batches_tracked"}


def test_the_configuration_from_shapes_is_the_one_that_was_written(tmp_path):
    component = component_at(write_vae(tmp_path, "comfyui"))
    with TensorFiles(*component.files) as files:
        found = vae_config(component, files.names)
    written = tiny_vae().config

    assert found == {key: list(v) if isinstance(v := written[key], tuple) else v for key in found}


def test_a_bfloat16_encoder_keeps_the_statistics_exact(tmp_path):
    vae = open_vae(component_at(write_vae(tmp_path)), CPU, torch.bfloat16)

    latents = vae.encode(image())
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, of_the_pipeline(image(), tiny_vae()), atol=0.1)
    assert torch.equal(vae._mean.flatten(), tiny_vae().bn.running_mean)


def test_references_are_encoded_at_their_own_size(tmp_path):
    encoder = Flux2LatentEncoder(open_vae(component_at(write_vae(tmp_path)), CPU, torch.float32))
    references = {"reference_image_0": image(32, 80), "reference_image_1": image()}

    encoded = encoder.encode(image()[:, None], references)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoded.items()}
    assert shapes == {
        "latents": (16, 1, 4, 3),
        "reference_latents_0": (16, 1, 2, 5),
        "reference_latents_1": (16, 1, 4, 3),
    }
    assert torch.equal(encoded["reference_latents_1"], encoded["latents"])


def test_a_vae_of_another_kind_is_refused(tmp_path):
    tensors = load_file(write_vae(tmp_path, "native"))
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith("bn.")}
    save_file(without, tmp_path / "ae.safetensors")

    with pytest.raises(UserError, match=r"not a FLUX.2 VAE"):
        open_vae(component_at(tmp_path / "ae.safetensors"), CPU, torch.float32)


def test_another_vae_has_another_identity(tmp_path):
    def identity(seed: int) -> str:
        vae = component_at(write_vae(tmp_path / str(seed), seed=seed))
        transformer = Component(files=vae.files, layout="diffusers")
        return latent_identity(ModelSource(traits=traits("flux2-dev"), transformer=transformer, vae=vae))

    assert identity(0) == identity(0) != identity(1)
