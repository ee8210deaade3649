"""Tiny Wan encoders with random weights, written as real checkpoints are: same names, keys and folders.

They let the demo and the tests run everything in seconds. Strides are those of the real networks (4×8×8
pixels a latent value, 4×16×16 for Wan 2.2's VAE), widths are not; all weights are fp32. The same seed gives
the same values in each layout:

- `native`, the files of Wan's authors: `Wan2.1_VAE.pth`, `models_t5_umt5-xxl-enc-bf16.pth`, …;
- `diffusers`, a folder for each network: `vae/`, `text_encoder/`, `tokenizer/`, `image_encoder/`;
- `comfyui`, one safetensors file for each network; the text encoder's holds the tokenizer too.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from tworeel.models.family import Layout
from tworeel.models.wan import image_keys, text_keys
from tworeel.models.wan.vae import LATENT_STATISTICS_48
from tworeel.models.wan.vae_keys import vae_modules

VOCABULARY = 384
"""Rows of the text encoder's embedding: at most 256 sentencepiece pieces and T5's 100 sentinels fit in."""
IMAGE_WIDTH = 80
"""Width of the tiny image encoder; a transformer that reads it has `image_dim = 80`."""
IMAGE_TOKENS = 50
"""Tokens of an image of 224 pixels in patches of 32; a FLF2V transformer has `pos_embed_seq_len = 100`."""

NATIVE_VAE = {16: "Wan2.1_VAE.pth", 48: "Wan2.2_VAE.pth"}
COMFYUI_VAE = {16: "wan_2.1_vae.safetensors", 48: "wan2.2_vae.safetensors"}
NATIVE_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
COMFYUI_TEXT = "umt5_xxl_fp16.safetensors"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_IMAGE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
COMFYUI_IMAGE = "clip_vision_h.safetensors"

_Network = TypeVar("_Network", bound=nn.Module)

_VAE_16: dict[str, Any] = {"base_dim": 8, "z_dim": 16}
_VAE_48: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    **LATENT_STATISTICS_48,
}

_SUBJECTS = ("a red ball", "a blue square", "the small cat", "an old dog", "a white bird", "two yellow fish")
_ACTIONS = ("rolls over", "moves across", "sleeps beside", "jumps over", "turns slowly above", "falls into")
_PLACES = (
    "a green hill",
    "the dark floor",
    "a warm stone",
    "the quiet street",
    "a deep lake",
    "the snow",
)


def write_vae(folder: Path, layout: Layout, *, z: int = 16, seed: int = 0) -> Path:
    """Write a VAE with 16 (Wan 2.1) or 48 (Wan 2.2) latent channels, decoder included; return its path."""
    vae = _seeded(lambda: AutoencoderKLWan(**{16: _VAE_16, 48: _VAE_48}[z]), seed)
    if layout == "diffusers":
        vae.save_pretrained(folder / "vae")
        return folder / "vae"
    native_of = {ours: theirs for theirs, ours in vae_modules(residual=z == 48).items()}
    tensors = _renamed(vae.state_dict(), native_of)
    return _save(tensors, folder / (NATIVE_VAE if layout == "native" else COMFYUI_VAE)[z])


def write_text_encoder(folder: Path, layout: Layout, *, seed: int = 0, d_model: int = 64) -> Path:
    """Write a UMT5 encoder of two layers; return its path. ComfyUI's file holds the tokenizer too."""
    config = UMT5Config(
        vocab_size=VOCABULARY, d_model=d_model, d_kv=16, d_ff=2 * d_model, num_layers=2, num_heads=4
    )
    model = _seeded(lambda: UMT5EncoderModel(config), seed)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    if layout == "diffusers":
        config.save_pretrained(folder / "text_encoder")
        return _save(tensors, folder / "text_encoder" / "model.safetensors").parent
    if layout == "comfyui":
        pieces = torch.frombuffer(bytearray(_sentencepiece_model()), dtype=torch.uint8)
        return _save(tensors | {"spiece_model": pieces}, folder / COMFYUI_TEXT)
    return _save(dict(_native_text(tensors)), folder / NATIVE_TEXT)


def write_tokenizer(folder: Path, layout: Layout) -> Path:
    """Write the tokenizer of the tiny text encoder; return its folder, or ComfyUI's text encoder file.

    It is a sentencepiece unigram model, trained on a few dozen captions that are made up here.
    """
    if layout == "comfyui":
        return folder / COMFYUI_TEXT
    target = folder / ("tokenizer" if layout == "diffusers" else NATIVE_TOKENIZER)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "spiece.model").write_bytes(_sentencepiece_model())
        T5Tokenizer.from_pretrained(scratch).save_pretrained(target)
    (target / "spiece.model").write_bytes(_sentencepiece_model())
    return target


def write_image_encoder(folder: Path, layout: Layout, *, seed: int = 0, width: int = IMAGE_WIDTH) -> Path:
    """Write a CLIP image encoder of three layers (`IMAGE_TOKENS` × `width` features); return its path."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=max(1, width // 80),
        hidden_act="gelu",
    )
    model = _seeded(lambda: CLIPVisionModel(config), seed)
    if layout == "native":
        return _save(dict(_native_image(model.state_dict())), folder / NATIVE_IMAGE)
    tensors = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    if layout == "diffusers":
        config.save_pretrained(folder / "image_encoder")
        return _save(tensors, folder / "image_encoder" / "model.safetensors").parent
    projection = {"visual_projection.weight": torch.zeros(8, width)}
    return _save(tensors | projection, folder / COMFYUI_IMAGE)


def _seeded(build: Callable[[], _Network], seed: int) -> _Network:
    """Build a network with its own initialization, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().eval()


def _save(tensors: Mapping[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(contiguous, path, metadata={"format": "pt"})
    else:
        torch.save(contiguous, path)
    return path


def _renamed(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    split = {name: name.rpartition(".") for name in tensors}
    return {f"{modules[module]}.{leaf}": tensors[name] for name, (module, _, leaf) in split.items()}


def _native_text(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    top = {ours: theirs for theirs, ours in text_keys.TOP.items()}
    block = {ours: theirs for theirs, ours in text_keys.BLOCK.items()}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in top:
            yield f"{top[module]}.{leaf}", tensor
        else:
            index, part = module.removeprefix("encoder.block.").split(".", 1)
            yield f"blocks.{index}.{block[part]}.{leaf}", tensor


def _native_image(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in image_keys.TOP.items():
        axes = {"cls_embedding": (1, 1, -1), "pos_embedding": (1, *tensors[ours].shape)}
        yield f"visual.{theirs}", tensors[ours].reshape(axes.get(theirs, tensors[ours].shape))
    layers = sum(name.endswith(".mlp.fc1.weight") for name in tensors)
    for index in range(layers):
        ours_layer, theirs_layer = f"encoder.layers.{index}", f"visual.transformer.{index}"
        for leaf in ("weight", "bias"):
            for theirs, ours in image_keys.LAYER.items():
                yield f"{theirs_layer}.{theirs}.{leaf}", tensors[f"{ours_layer}.{ours}.{leaf}"]
            fused = torch.cat([tensors[f"{ours_layer}.{part}.{leaf}"] for part in image_keys.SPLIT])
            yield f"{theirs_layer}.{image_keys.FUSED}.{leaf}", fused
    yield "visual.head", torch.zeros(tensors["pre_layrnorm.weight"].shape[0], 8)
    yield "textual.token_embedding.weight", torch.zeros(4, 8)
    yield "log_scale", torch.zeros(())


def _sentencepiece_model() -> bytes:
    captions = map(" ".join, itertools.product(_SUBJECTS, _ACTIONS, _PLACES))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions,
        model_writer=model,
        model_type="unigram",
        vocab_size=256,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
