"""The text encoder and its tokenizer against transformers and diffusers' pipeline, in every layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tworeel.errors import UserError
from tworeel.models.family import Component, Layout
from tworeel.models.wan.text import (
    clean_caption,
    embedded_sentencepiece,
    open_tokenizer,
    open_umt5,
    text_config,
)
from tworeel.models.wan.text_keys import native_parameter_name
from tworeel.weights.tensor_files import TensorInfo

CPU = torch.device("cpu")
CAPTIONS = (
    "a red ball rolls over a green hill",
    "  The   caf\u00c3\u00a9 &amp;amp; the lake,\n at night: 好!  ",
    "",
)
OpenComponent = Callable[..., Component]
OpenPath = Callable[[Layout], Path]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_embeddings_are_those_of_diffusers_pipeline(
    tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath, layout: Layout, caption: str
) -> None:
    ours = open_umt5(tiny_text_encoder(layout), tiny_tokenizer(layout), CPU, torch.float32).encode(caption)
    parts: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(tiny_tokenizer("diffusers")),
        "text_encoder": UMT5EncoderModel.from_pretrained(tiny_text_encoder("diffusers").files[0].parent),
        "vae": None,
        "scheduler": None,
    }
    pipeline = WanPipeline(**parts)
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(caption, max_sequence_length=512, device=CPU)[0]
    text = ours["text"]
    assert list(ours) == ["text"] and 0 < len(text) < 512
    assert torch.equal(text, theirs[: len(text)])
    assert not theirs[len(text) :].any()


def test_every_layout_gives_the_same_bits(tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath) -> None:
    native, diffusers, comfyui = (
        open_umt5(tiny_text_encoder(layout), tiny_tokenizer(layout), CPU, torch.bfloat16).encode(CAPTIONS[0])
        for layout in ("native", "diffusers", "comfyui")
    )
    assert native["text"].dtype == torch.bfloat16
    assert torch.equal(native["text"], diffusers["text"]) and torch.equal(native["text"], comfyui["text"])


@pytest.mark.parametrize("caption", [*CAPTIONS, "zwölf Zürcher", "ﬁne  ＡＢ"])
def test_tokens_are_those_of_sentencepiece_with_an_end(
    tiny_tokenizer: OpenPath, layout: Layout, caption: str
) -> None:
    model = embedded_sentencepiece(tiny_tokenizer("comfyui"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = open_tokenizer(tiny_tokenizer(layout))(caption).input_ids
    assert tokens == [*pieces.encode(caption), pieces.eos_id()]


def test_a_sentencepiece_model_alone_is_a_tokenizer(tiny_tokenizer: OpenPath, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((tiny_tokenizer("native") / "spiece.model").read_bytes())
    bare, whole = open_tokenizer(tmp_path), open_tokenizer(tiny_tokenizer("native"))
    assert bare(CAPTIONS[0]).input_ids == whole(CAPTIONS[0]).input_ids


def test_a_folder_or_file_without_a_tokenizer_is_refused(tiny_vae: OpenComponent, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer here"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_tokenizer(tiny_vae("comfyui").files[0])


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("x")
    with pytest.raises(UserError, match=r"the tokenizer cannot be read \(.*Error"):
        open_tokenizer(tmp_path)


def test_a_caption_that_is_too_long_is_cut_with_a_warning(
    tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = open_umt5(tiny_text_encoder("native"), tiny_tokenizer("native"), CPU, torch.float32)
    with caplog.at_level(logging.WARNING, logger="tworeel"):
        encoder.encode("a red ball")
        assert not caplog.records
        assert encoder.encode("a red ball " * 300)["text"].shape == (512, 64)
    assert "a red ball a red ball" in caplog.text and "512" in caplog.text


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("caf\u00c3\u00a9", "café"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        (" two \n\t lines\u00a0here ", "two lines here"),
    ],
)
def test_captions_are_cleaned_as_for_inference(caption: str, clean: str) -> None:
    assert clean_caption(caption) == clean


@pytest.mark.parametrize(
    ("native", "transformers"),
    [
        ("token_embedding.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
        ("blocks.3.norm2.weight", "encoder.block.3.layer.1.layer_norm.weight"),
        ("blocks.11.attn.o.weight", "encoder.block.11.layer.0.SelfAttention.o.weight"),
        ("blocks.0.ffn.gate.0.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        ("blocks.0.ffn.fc1.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
        (
            "blocks.5.pos_embedding.embedding.weight",
            "encoder.block.5.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    ],
)
def test_names_of_the_authors_file(native: str, transformers: str) -> None:
    assert native_parameter_name(native) == transformers


def test_shapes_tell_the_config_of_umt5_xxl() -> None:
    published = {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
    }
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_dict(published))
    names = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    assert text_config(Component(files=(Path("umt5"),), layout="comfyui"), names) == published


@pytest.mark.parametrize("kept", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_either_name_of_the_embedding_is_enough(
    tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    tensors = load_file(tiny_text_encoder("comfyui").files[0])
    embedding = tensors.pop("shared.weight")
    save_file(tensors | {f"{name}.weight": embedding.clone() for name in kept}, tmp_path / "umt5.safetensors")
    component = Component(files=(tmp_path / "umt5.safetensors",), layout="comfyui")
    found = open_umt5(component, tiny_tokenizer("native"), CPU, torch.float32).encode(CAPTIONS[0])
    expected = open_umt5(tiny_text_encoder("native"), tiny_tokenizer("native"), CPU, torch.float32)
    assert torch.equal(found["text"], expected.encode(CAPTIONS[0])["text"])


def test_an_fp8_scaled_file_gives_nearly_the_same_embeddings(
    tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath, tmp_path: Path
) -> None:
    tensors = load_file(tiny_text_encoder("comfyui").files[0])
    quantized = dict(tensors) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name in [name for name in tensors if ".SelfAttention.q." in name or ".DenseReluDense." in name]:
        scale = tensors[name].abs().max() / 448
        quantized[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        quantized[name.replace(".weight", ".scale_weight")] = scale
    file = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(quantized, file)
    found = open_umt5(Component(files=(file,), layout="comfyui"), file, CPU, torch.float32)
    exact = open_umt5(tiny_text_encoder("native"), tiny_tokenizer("native"), CPU, torch.float32)
    text, expected = (encoder.encode(CAPTIONS[0])["text"] for encoder in (found, exact))
    assert torch.cosine_similarity(text, expected).min() > 0.99
    assert not torch.equal(text, expected)


def test_another_networks_file_is_named_as_such(tiny_vae: OpenComponent, tiny_tokenizer: OpenPath) -> None:
    with pytest.raises(UserError, match="not a UMT5 encoder"):
        open_umt5(tiny_vae("native"), tiny_tokenizer("native"), CPU, torch.float32)
