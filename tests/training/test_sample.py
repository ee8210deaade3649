"""`tworeel sample` renders what diffusers renders with the exported LoRA, on any stages."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from tiny_runs import ITS_CLIPS, T2V, Watcher
from torch import Tensor
from transformers import UMT5EncoderModel

from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.models.wan.sampling import make_scheduler
from tworeel.models.wan.vae import load_vae
from tworeel.models.wan.variants import traits
from tworeel.signals import Stopped
from tworeel.training.assembly import load_transformer
from tworeel.training.run import train
from tworeel.training.sample import sample

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]

SAMPLE = {
    "prompts": ("a red ball rolls over a green hill", "a blue square"),
    "negative_prompt": "an old dog",
    "steps": 6,
    "size": (64, 32),
    "frames": 5,
    "seed": 3,
}
LOUD = {"learning_rate": 2e-2}
"""A rate at which the LoRA counts for far more than rounding."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture of the size that is rendered: nothing is left to crop or to resize."""
    write_clips(tmp_path / "stills", count=0)
    path = tmp_path / "stills" / "image.png"
    Image.open(path).resize((64, 32)).save(path)
    return path


def with_engine(config: RunConfig, **engine: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def diffusers_latents(
    config: RunConfig, variant: str, loras: dict[str | None, Path], image: Path | None
) -> list[Tensor]:
    """Those of diffusers' own pipeline, with its own text encoder and VAE, and both experts at once."""
    kind: Any = WanPipeline if image is None else WanImageToVideoPipeline
    scheduler = make_scheduler(traits(variant, None))
    with_clip = {} if image is None else {"image_encoder": None, "image_processor": None}
    pipe = kind.from_pretrained(config.model.path, dtype=torch.float32, scheduler=scheduler, **with_clip)
    if image is not None:
        pipe.register_to_config(expand_timesteps=variant == "wan2.2-ti2v-5b")
    for expert, path in loras.items():
        pipe.load_lora_weights(path, load_into_transformer_2=expert == "low")
    asked: dict[str, Any] = dict(config.sample)
    return [
        pipe(
            prompt=prompt,
            negative_prompt=asked["negative_prompt"],
            width=asked["size"][0],
            height=asked["size"][1],
            num_frames=asked["frames"],
            num_inference_steps=asked["steps"],
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(asked["seed"]),
            output_type="latent",
            **({} if image is None else {"image": Image.open(image)}),
        ).frames
        for prompt in asked["prompts"]
    ]


@pytest.mark.parametrize(
    ("variant", "has_image"),
    [
        (T2V, False),
        ("wan2.2-ti2v-5b", False),
        ("wan2.2-ti2v-5b", True),
        ("wan2.2-t2v-a14b", False),
        ("wan2.2-i2v-a14b", True),
    ],
)
def test_what_is_rendered_on_1_2_and_3_stages_is_what_diffusers_renders_with_the_exported_lora(
    make_config: MakeConfig,
    make_model: MakeModel,
    tmp_path: Path,
    image: Path,
    latents: list[Tensor],
    variant: str,
    has_image: bool,
) -> None:
    model, given = make_model(variant, "diffusers"), image if has_image else None
    loras: dict[str | None, Path] = {}
    for expert in ("high", "low") if "a14b" in variant else (None,):
        trained = make_config(
            f"run-{expert}",
            model=model.model_copy(update={"expert": expert}),
            data=ITS_CLIPS,
            train={"steps": 2, **LOUD},
        )
        loras[expert] = train(trained).lora
    config = make_config("run-high", model=model, sample={**SAMPLE, "image": given, "strengths": (0, 1)})
    found = []
    for stages in (1, 2, 3):
        sample(
            with_engine(config, devices=("cpu",) * stages), folder=tmp_path / f"sheet{stages}", loras=loras
        )
        found.append(list(latents))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for strength, expected_loras in ((0, {}), (1, loras)):
        expected = diffusers_latents(config, variant, expected_loras, given)
        for ours, theirs in zip(found[0][strength::2], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (found[0][0] - found[0][1]).abs().max() > 1e-2, "the LoRA would not be missed"


def test_an_image_is_that_of_diffusers_own_decoder_and_the_same_for_the_same_seed(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(T2V, "diffusers")
    asked = {**SAMPLE, "prompts": SAMPLE["prompts"][:1], "frames": 1, "strengths": (0.0,)}
    config = make_config(model=model, sample=asked)
    pictures = [sample(config, folder=tmp_path / name).takes[0].read_bytes() for name in ("first", "second")]
    assert pictures[0] == pictures[1]
    [latent] = diffusers_latents(config, T2V, {}, None)
    vae: Any = WanPipeline.from_pretrained(model.path, scheduler=None).vae
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        decoded = vae.decode(latent * std + mean).sample[0, :, 0].permute(1, 2, 0)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "first/prompt-01-strength-0.png")))
    assert ((decoded + 1) * 127.5 - picture).abs().max() < 0.51


@pytest.mark.parametrize("quantize", ["fp8", "int8", "nf4"])
def test_a_quantized_model_with_streamed_weights_renders_the_same_on_one_and_two_stages(
    make_config: MakeConfig, tmp_path: Path, latents: list[Tensor], quantize: str
) -> None:
    config = make_config(train={"steps": 2, **LOUD}, sample={**SAMPLE, "strengths": (0, 0.5, 1)})
    train(config)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"quantize": quantize, "dtype": "bfloat16"})}
    )
    sample(with_engine(config, devices=("cpu",)), folder=tmp_path / "one")
    expected = list(latents)
    streamed = with_engine(config, residency="recompute", streamed_blocks=(2, 1))
    sample(streamed, folder=tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(expected, latents, strict=True))
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[1], expected[2])


def test_everything_lies_in_one_folder_and_a_video_is_a_video(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(sample={**SAMPLE, "strengths": (0,)})
    watcher = Watcher()
    sheet = sample(config, folder=tmp_path / "sheet", observer=watcher)
    names = sorted(path.name for path in (tmp_path / "sheet").iterdir())
    assert names == ["contact-sheet.png", "prompt-01-strength-0.mp4", "prompt-02-strength-0.mp4"]
    assert sheet.path.name == names[0] and [path.name for path in sheet.takes] == names[1:]
    assert Image.open(sheet.path).width > 3 * 64


def test_one_expert_can_render_alone(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path, latents: list[Tensor]
) -> None:
    config = make_config(model=make_model("wan2.2-t2v-a14b"), sample={**SAMPLE, "strengths": (0,)})
    sample(config, folder=tmp_path / "both")
    both = list(latents)
    sample(config, folder=tmp_path / "alone", single_expert=True)
    assert not torch.equal(both[0], latents[0])


def networks_in_memory() -> list[str]:
    """Classes of the networks that have weights now."""
    kinds = (WanTransformer3DModel, UMT5EncoderModel, AutoencoderKLWan)
    found = [thing for thing in gc.get_objects() if isinstance(thing, kinds)]
    return [type(n).__name__ for n in found if any(not p.is_meta for p in n.parameters())]


def test_no_network_is_in_memory_beside_another(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # those of other tests
    others = networks_in_memory()
    seen: list[list[str]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **kwargs: Any) -> Any:
            seen.append(networks_in_memory())
            return function(*args, **kwargs)

        return look

    monkeypatch.setattr("tworeel.training.sample.load_transformer", watched(load_transformer))
    monkeypatch.setattr("tworeel.models.wan.vae_decoder.load_vae", watched(load_vae))
    config = make_config(
        model=make_model("wan2.2-t2v-a14b"),
        sample={**SAMPLE, "strengths": (0,)},
        cache={"folder": tmp_path / "cache"},
        engine={"streamed_blocks": (1, 1), "residency": "recompute"},
    )
    sample(config, folder=tmp_path / "sheet")
    assert seen == [others] * 3, "before each expert and before the decoder"


def test_a_signal_while_rendering_stops_it(make_config: MakeConfig, tmp_path: Path) -> None:
    class Stopping(Watcher):
        def start(self, title: str, total: int) -> None:
            self.title = title

        def poll(self) -> None:
            if getattr(self, "title", "") == "Rendering":
                raise Stopped(2)

    with pytest.raises(Stopped):
        sample(make_config(sample={**SAMPLE, "strengths": (0,)}), folder=tmp_path, observer=Stopping())


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_made(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path
) -> None:
    config = make_config(
        model=make_model("wan2.2-i2v-a14b"),
        sample={"size": (60, 64), "frames": 4},
        engine={"devices": ("cpu", "cuda:99")},
    )
    with pytest.raises(UserError) as error:
        sample(config, folder=tmp_path / "sheet", loras={"high": tmp_path / "none.safetensors"})
    said = "\n".join(error.value.problems)
    for words in ("sample.prompts: none", "sample.size = [60, 64]", "sample.frames = 4", "sample.image"):
        assert words in said
    assert "none.safetensors" in said and "'cuda:99' does not exist" in said
    assert not (tmp_path / "sheet").exists()


def test_a_lora_that_was_trained_on_the_other_expert_is_refused(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path
) -> None:
    config = make_config(model=make_model("wan2.2-t2v-a14b"), train={"steps": 2}, sample=SAMPLE)
    lora = train(config).lora
    with pytest.raises(UserError, match="was trained on the high-noise expert, not on 'low'"):
        sample(config, folder=tmp_path / "sheet", loras={"low": lora})


def test_a_lora_of_another_model_or_expert_is_refused(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path
) -> None:
    other = make_config("other", model=make_model(T2V, "native", dim=256), train={"steps": 2})
    lora = train(other).lora
    config = make_config(sample=SAMPLE)
    with pytest.raises(UserError, match="has inputs and outputs"):
        sample(config, folder=tmp_path / "sheet", loras={None: lora})
    with pytest.raises(UserError, match=r"--expert-lora high=.*no such expert"):
        sample(config, folder=tmp_path / "sheet", loras={"high": lora})
    with pytest.raises(UserError, match="there is no LoRA yet; give one with --lora"):
        sample(config, folder=tmp_path / "sheet")
