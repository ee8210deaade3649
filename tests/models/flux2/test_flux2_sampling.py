"""`tworeel sample` renders what diffusers' own pipelines render with the exported LoRA, on any stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor

from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.demo.flux2_checkpoint import write_flux2_checkpoint
from tworeel.errors import UserError
from tworeel.models.family import ModelRequest, Picture
from tworeel.models.flux2.layouts import locate
from tworeel.models.flux2.sampling import SAMPLING, is_distilled, make_scheduler
from tworeel.models.flux2.text import open_text_encoder
from tworeel.models.flux2.variants import traits
from tworeel.training.run import train
from tworeel.training.sample import sample

CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a red ball on a hill", "an old dog"
STEPS, GUIDANCE, SEED = 3, 3.0, 5


@pytest.fixture(scope="module", params=["flux2-dev", "flux2-klein-4b", "flux2-klein-base-4b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A variant and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_flux2_checkpoint(folder, variant=request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a size that needs neither resizing nor cropping."""
    folder = tmp_path_factory.mktemp("stills")
    write_clips(folder, count=0)
    path = folder / "image.png"
    Image.open(path).resize((64, 80)).save(path)
    return path


@pytest.fixture(scope="module")
def lora(model: tuple[str, Path], picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that was trained for the model."""
    return train(config_of(model[1], picture, tmp_path_factory.mktemp("trained") / "run", 1)).lora


def config_of(path: Path, picture: Path, output: Path, stages: int, **asked: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "data": {"sources": ({"path": picture.parent},), "resolution": (64, 64)},
            "cache": {"folder": output.parent / "cache", "dtype": "float32"},
            "lora": {"rank": 2},
            "train": {"output": output, "steps": 2, "learning_rate": 2e-2, "tensorboard": False},
            "engine": {"devices": ("cpu",) * stages},
            "sample": {
                "prompts": (PROMPT,),
                "negative_prompt": NEGATIVE,
                "steps": STEPS,
                "guidance": GUIDANCE,
                "seed": SEED,
                "size": (64, 32),
                "strengths": (0, 1),
                **asked,
            },
        }
    )


def diffusers_latents(variant: str, path: Path, lora: Path | None, image: Path | None) -> Tensor:
    """Those of diffusers' own pipeline with its own VAE; the captions' embeddings are compared elsewhere."""
    parts: dict[str, Any] = {
        "transformer": Flux2Transformer2DModel.from_pretrained(path / "transformer", dtype=torch.float32),
        "vae": AutoencoderKLFlux2.from_pretrained(path / "vae", dtype=torch.float32),
        "scheduler": make_scheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }
    is_dev = variant == "flux2-dev"
    pipe: Any = (
        Flux2Pipeline(**parts) if is_dev else Flux2KleinPipeline(**parts, is_distilled="base" not in variant)
    )
    if lora is not None:
        pipe.load_lora_weights(lora)
    source = locate(ModelRequest(path=str(path)))
    assert source is not None
    embed = open_text_encoder(source, CPU, torch.float32).encode
    negative = {} if is_dev else {"negative_prompt_embeds": embed(NEGATIVE)["text"][None]}
    found: Tensor = pipe(
        prompt_embeds=embed(PROMPT)["text"][None],
        **negative,
        image=None if image is None else Image.open(image).convert("RGB"),
        width=64,
        height=32,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    return found


@pytest.mark.parametrize("with_reference", [False, True])
def test_what_is_rendered_on_1_and_3_stages_is_what_diffusers_renders_with_the_exported_lora(
    model: tuple[str, Path],
    picture: Path,
    lora: Path,
    tmp_path: Path,
    latents: list[Tensor],
    with_reference: bool,
) -> None:
    variant, path = model
    image = picture if with_reference else None
    found = []
    for stages in (1, 3):
        config = config_of(path, picture, tmp_path / "run", stages, image=image)
        sheet = sample(config, folder=tmp_path / f"sheet{stages}", loras={None: lora})
        assert sheet.path.is_file()
        found.append(list(latents))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for ours, file in zip(found[0], (None, lora), strict=True):
        torch.testing.assert_close(ours, diffusers_latents(variant, path, file, image), rtol=1e-4, atol=1e-4)
    assert (found[0][0] - found[0][1]).abs().max() > 1e-2, "the LoRA would not be missed"


def test_only_base_models_are_guided_by_a_negative_prompt_unless_it_is_asked_for() -> None:
    found = {name: SAMPLING.guidance(traits(name)) for name in ("flux2-dev", "flux2-klein-4b")}
    assert found == {"flux2-dev": 4.0, "flux2-klein-4b": 1.0}
    assert SAMPLING.guidance(traits("flux2-klein-base-9b")) == 4.0
    assert is_distilled(traits("flux2-klein-9b")) and not is_distilled(traits("flux2-dev"))
    assert not SAMPLING.takes_negative(traits("flux2-dev"))


def test_the_pipeline_holds_no_network(model: tuple[str, Path]) -> None:
    _, path = model
    source = locate(ModelRequest(path=str(path)))
    assert source is not None
    part = torch.nn.Module()
    part.config = Flux2Transformer2DModel.load_config(path / "transformer")
    part.device, part.dtype = CPU, torch.float32
    picture = Picture(text={}, width=64, height=32, frames=1, steps=1, guidance=1.0)
    pipeline = SAMPLING.make_pipeline(source, [part], picture)
    parts = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    assert parts and not any(list(one.parameters()) for one in parts)


def test_a_reference_image_that_is_not_there_is_named(model: tuple[str, Path], picture: Path, tmp_path: Path):
    config = config_of(model[1], picture, tmp_path / "run", 1, image=tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"sample\.image: .*nothing\.png"):
        sample(config, folder=tmp_path / "sheet")
