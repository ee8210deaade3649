"""What the transformer is given, held against the pipeline's own static methods."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Pipeline

from tworeel.demo.tiny_flux2 import tiny_transformer
from tworeel.models.family import Component, ModelSource
from tworeel.models.flux2.conditioning import cached_shapes, make_sample
from tworeel.models.flux2.variants import traits
from tworeel.training.objective import flow_loss

HEIGHT, WIDTH = 64, 48
REFERENCES = ((32, 80), (64, 48))


def source_of(variant: str) -> ModelSource:
    config = dict(tiny_transformer(variant).config)
    return ModelSource(
        traits=traits(variant), transformer=Component(files=(), layout="diffusers", config=config)
    )


def cached(variant: str, references=REFERENCES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = cached_shapes(source_of(variant), 1, HEIGHT, WIDTH, references)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sample_of(variant: str = "flux2-dev", references=REFERENCES, sigma: float = 0.25, **options):
    tensors = cached(variant, references)
    noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(1))
    sample = make_sample(traits(variant), tensors, noise, sigma, dtype=torch.float32, **options)
    return sample, tensors, noise


def test_shapes_are_those_of_patches_of_16_pixels_and_512_words():
    assert cached_shapes(source_of("flux2-dev"), 1, HEIGHT, WIDTH, REFERENCES) == {
        "latents": (16, 1, 4, 3),
        "text": (512, 96),
        "reference_latents_0": (16, 1, 2, 5),
        "reference_latents_1": (16, 1, 4, 3),
    }


def test_the_image_and_its_references_are_packed_as_the_pipeline_packs_them():
    sample, tensors, noise = sample_of()
    noisy = 0.75 * tensors["latents"] + 0.25 * noise
    images = [noisy, tensors["reference_latents_0"], tensors["reference_latents_1"]]
    packed = [Flux2Pipeline._pack_latents(image[:, 0][None]) for image in images]

    assert torch.allclose(sample.inputs["hidden_states"], torch.cat(packed, dim=1), atol=1e-6)
    target = Flux2Pipeline._pack_latents((noise - tensors["latents"])[:, 0][None])
    assert torch.equal(sample.target, target)


def test_coordinates_are_the_pipelines():
    sample, tensors, _ = sample_of()
    references = [tensors[f"reference_latents_{i}"][:, 0][None] for i in range(2)]
    image_ids = Flux2Pipeline._prepare_latent_ids(tensors["latents"][:, 0][None])
    wanted = torch.cat([image_ids, Flux2Pipeline._prepare_image_ids(references)], dim=1)

    assert torch.equal(sample.inputs["img_ids"], wanted)
    assert torch.equal(sample.inputs["txt_ids"], Flux2Pipeline._prepare_text_ids(tensors["text"][None]))


@pytest.mark.parametrize(("variant", "guidance"), [("flux2-dev", 1.0), ("flux2-klein-4b", None)])
def test_the_timestep_is_sigma_and_only_dev_has_a_guidance(variant, guidance):
    inputs = sample_of(variant)[0].inputs

    assert inputs["timestep"].tolist() == [0.25]
    assert guidance == (None if inputs["guidance"] is None else inputs["guidance"].item())


def test_without_conditioning_no_reference_is_shown():
    shown, hidden = sample_of()[0], sample_of(condition_on_image=False)[0]
    plain = sample_of(references=())[0]

    assert shown.inputs["hidden_states"].shape[1] == 12 + 10 + 12
    assert hidden.inputs["hidden_states"].shape == plain.inputs["hidden_states"].shape == (1, 12, 16)


def test_the_loss_is_that_of_the_images_own_tokens():
    sample = sample_of()[0]
    output = torch.zeros(1, 34, 16)
    output[:, 12:] = 1e6  # of the references

    assert flow_loss(output, sample.target, None) == sample.target.square().mean()


@pytest.mark.parametrize("variant", ["flux2-dev", "flux2-klein-4b"])
def test_the_transformer_takes_the_sample(variant):
    sample = sample_of(variant)[0]
    output = tiny_transformer(variant)(**sample.inputs, return_dict=False)[0]

    assert output.shape == (1, 34, 16)
    assert torch.isfinite(output).all()
