"""The VAE's encoder against diffusers' own, in every layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from tworeel.errors import UserError
from tworeel.models.family import Component, Layout
from tworeel.models.wan.vae import LATENT_STATISTICS_48, open_vae, vae_config, vae_parameter_name
from tworeel.models.wan.vae_keys import vae_modules
from tworeel.weights.tensor_files import TensorInfo

CPU = torch.device("cpu")
OpenComponent = Callable[..., Component]


def random_clip(frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, frames, 32, 48), dtype=torch.uint8, generator=generator)


def diffusers_latents(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """What diffusers' pipelines make of pixels in [-1, 1]."""
    with torch.no_grad():
        mean = vae.encode(video[None]).latent_dist.mode()[0]
    shift, scale = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    return (mean - shift) * (1 / scale)


def diffusers_vae(component: Component) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(component.files[0].parent)


@pytest.mark.parametrize("z", [16, 48])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_are_those_of_diffusers(tiny_vae: OpenComponent, layout: Layout, z: int, frames: int) -> None:
    clip = random_clip(frames)
    ours = open_vae(tiny_vae(layout, z=z), CPU, torch.float32).encode_clip(clip)
    theirs = diffusers_latents(diffusers_vae(tiny_vae("diffusers", z=z)), clip.float() / 127.5 - 1)
    stride = {16: 8, 48: 16}[z]
    assert ours.shape == (z, (frames + 3) // 4, 32 // stride, 48 // stride)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("z", [16, 48])
def test_every_layout_gives_the_same_bits(tiny_vae: OpenComponent, z: int) -> None:
    clip = random_clip()
    native, diffusers, comfyui = (
        open_vae(tiny_vae(layout, z=z), CPU, torch.float32).encode_clip(clip)
        for layout in ("native", "diffusers", "comfyui")
    )
    assert torch.equal(native, diffusers) and torch.equal(native, comfyui)


@pytest.mark.parametrize("with_last", [False, True])
def test_a_clip_known_at_its_ends_is_grey_between_them(tiny_vae: OpenComponent, with_last: bool) -> None:
    clip = random_clip(9)
    pixels = clip.float() / 127.5 - 1
    known = torch.zeros_like(pixels)
    known[:, 0] = pixels[:, 0]
    if with_last:
        known[:, -1] = pixels[:, -1]
    vae = open_vae(tiny_vae("native"), CPU, torch.float32)
    ours = vae.encode_ends(clip[:, 0], clip[:, -1] if with_last else None, 9)
    theirs = diffusers_latents(diffusers_vae(tiny_vae("diffusers")), known)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_latents_are_fp32_whatever_the_vae_computes_in(tiny_vae: OpenComponent) -> None:
    clip = random_clip()
    exact = open_vae(tiny_vae("native"), CPU, torch.float32).encode_clip(clip)
    rounded = open_vae(tiny_vae("native"), CPU, torch.bfloat16).encode_clip(clip)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)


def test_names_of_wan_2_1_are_those_of_diffusers_converter(tiny_vae: OpenComponent) -> None:
    keys = list(torch.load(tiny_vae("native").files[0], weights_only=True))
    converted = convert_wan_vae_to_diffusers({key: key for key in keys})
    modules = vae_modules(residual=False)
    for name, key in converted.items():
        module, _, leaf = key.rpartition(".")
        assert f"{modules[module]}.{leaf}" == name
    assert converted.keys() == diffusers_vae(tiny_vae("diffusers")).state_dict().keys()


@pytest.mark.parametrize(
    ("native", "diffusers"),
    [
        ("encoder.downsamples.0.downsamples.0.residual.0", "encoder.down_blocks.0.resnets.0.norm1"),
        ("encoder.downsamples.1.downsamples.0.shortcut", "encoder.down_blocks.1.resnets.0.conv_shortcut"),
        ("encoder.downsamples.1.downsamples.2.time_conv", "encoder.down_blocks.1.downsampler.time_conv"),
        ("encoder.middle.1.to_qkv", "encoder.mid_block.attentions.0.to_qkv"),
        ("decoder.upsamples.2.upsamples.3.resample.1", "decoder.up_blocks.2.upsampler.resample.1"),
        ("decoder.upsamples.3.upsamples.2.residual.6", "decoder.up_blocks.3.resnets.2.conv2"),
        ("decoder.head.2", "decoder.conv_out"),
    ],
)
def test_names_of_wan_2_2_are_nested_by_stage(native: str, diffusers: str) -> None:
    assert vae_modules(residual=True)[native] == diffusers


@pytest.mark.parametrize("residual", [False, True])
def test_every_weight_of_the_published_vae_has_one_native_name(residual: bool) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**(PUBLISHED_2_2 if residual else {}))
    modules = vae_modules(residual)
    named = {name.rpartition(".")[0] for name in vae.state_dict()}
    assert len(set(modules.values())) == len(modules)
    assert named <= set(modules.values())


PUBLISHED_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    **LATENT_STATISTICS_48,
}


@pytest.mark.parametrize("published", [{"base_dim": 96, "z_dim": 16}, PUBLISHED_2_2])
def test_shapes_tell_the_config_of_the_published_vaes(published: dict[str, object]) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**published)
    names = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in vae.state_dict().items()}
    found = vae_config(Component(files=(Path("vae.safetensors"),), layout="comfyui"), names)
    expected = {key: value for key, value in dict(vae.config).items() if key in found}
    assert found == expected
    assert len(LATENT_STATISTICS_48["latents_mean"]) == len(LATENT_STATISTICS_48["latents_std"]) == 48


def test_the_decoder_is_neither_needed_nor_read(tiny_vae: OpenComponent, tmp_path: Path) -> None:
    whole = load_file(tiny_vae("comfyui").files[0])
    name_of = vae_parameter_name(whole)
    half = {key: tensor for key, tensor in whole.items() if name_of(key) is not None}
    assert not any(key.startswith(("decoder.", "conv2.")) for key in half) and len(half) < len(whole)
    save_file(half, tmp_path / "vae.safetensors")
    vae = open_vae(Component(files=(tmp_path / "vae.safetensors",), layout="comfyui"), CPU, torch.float32)
    clip = random_clip()
    assert torch.equal(
        vae.encode_clip(clip), open_vae(tiny_vae("native"), CPU, torch.float32).encode_clip(clip)
    )


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_pth_file_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": Intruder(mark)}, file)
    with pytest.raises(UserError) as refused:
        open_vae(Component(files=(file,), layout="native"), CPU, torch.float32)
    assert not mark.exists()
    assert len(refused.value.problems) == 1 and str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    pickle.loads(pickle.dumps(Intruder(mark)))
    assert mark.exists()  # the trap itself works


def test_another_networks_file_is_named_as_such(tiny_text_encoder: OpenComponent) -> None:
    with pytest.raises(UserError, match="not a Wan VAE"):
        open_vae(tiny_text_encoder("native"), CPU, torch.float32)


def test_a_vae_that_lacks_a_tensor_is_refused(tiny_vae: OpenComponent, tmp_path: Path) -> None:
    tensors = load_file(tiny_vae("comfyui").files[0])
    del tensors["encoder.head.2.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"encoder\.conv_out\.bias"):
        open_vae(Component(files=(tmp_path / "vae.safetensors",), layout="comfyui"), CPU, torch.float32)
