"""FLUX.2's text encoders give what diffusers' pipelines give."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from tworeel.demo.tiny_flux2_encoders import (
    WIDTH,
    TextKind,
    write_flux2_text_encoder,
)
from tworeel.errors import UserError
from tworeel.models.family import Component, Layout, ModelSource
from tworeel.models.flux2.text import open_spread, open_streamed, open_text_encoder, text_identity
from tworeel.models.flux2.text_networks import (
    MISTRAL,
    QWEN,
    TextNetwork,
    build_network,
    network_config,
    text_network,
)
from tworeel.models.flux2.text_streaming import WeightsOnDisk
from tworeel.quant.frozen import FrozenLinear
from tworeel.weights.tensor_files import TensorFiles

KINDS: tuple[TextKind, ...] = ("mistral3", "qwen3")
CAPTIONS = {
    "short": "a red ball rolls over a green hill",
    "empty": "",
    "image word": "[IMG] the small cat, seen twice [IMG]",
    "long": "two yellow fish turn slowly above a deep lake, " * 60,
}
CPU = torch.device("cpu")
Source = Callable[[TextKind, Layout], ModelSource]


def from_pipeline(source: ModelSource, *captions: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embed captions as the pipeline does that is loaded from the model's folder."""
    assert source.text_encoder is not None and source.tokenizer is not None
    is_qwen = "qwen3" in source.text_encoder.config["model_type"]
    network = Qwen3ForCausalLM if is_qwen else Mistral3ForConditionalGeneration
    pipeline = Flux2KleinPipeline if is_qwen else Flux2Pipeline
    made = pipeline(
        text_encoder=network.from_pretrained(source.text_encoder.files[0].parent, dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(source.tokenizer),
        vae=None,
        scheduler=None,
        transformer=None,
    )
    return made.encode_prompt(list(captions), device=CPU)[0]


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS.keys())
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_text_is_that_of_the_pipeline(flux2_source: Source, kind: TextKind, caption: str) -> None:
    source = flux2_source(kind, "diffusers")
    text = open_text_encoder(source, CPU, torch.float32).encode(caption)["text"]
    assert text.shape == (512, 3 * WIDTH)
    assert torch.equal(text, from_pipeline(source, caption)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_captions_at_a_time_are_those_of_the_pipeline_too(flux2_source: Source, kind: TextKind) -> None:
    source = flux2_source(kind, "diffusers")
    captions = [CAPTIONS["short"], CAPTIONS["empty"], CAPTIONS["long"]]
    encoder = open_text_encoder(source, CPU, torch.float32)
    assert encoder.batch_size == 1
    together, expected = encoder.encode_batch(captions), from_pipeline(source, *captions)
    for embedded, text, caption in zip(together, expected, captions, strict=True):
        assert torch.equal(embedded["text"], text)
        torch.testing.assert_close(text, encoder.encode(caption)["text"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_differ_from_layer_to_layer_and_from_caption_to_caption(
    flux2_source: Source, kind: TextKind
) -> None:
    encoder = open_text_encoder(flux2_source(kind, "diffusers"), CPU, torch.float32)
    one, other = (encoder.encode(CAPTIONS[name])["text"] for name in ("short", "long"))
    assert (one - other).abs().max() > 0.1
    first, second, third = one.split(WIDTH, dim=-1)
    assert (first - second).abs().max() > 0.1 and (second - third).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_text_in_bf16_is_that_of_the_pipeline_in_bf16(flux2_source: Source, kind: TextKind) -> None:
    source = flux2_source(kind, "diffusers")
    text = open_text_encoder(source, CPU, torch.bfloat16).encode(CAPTIONS["short"])["text"]
    assert text.dtype == torch.bfloat16
    assert torch.equal(text, from_pipeline(source, CAPTIONS["short"], dtype=torch.bfloat16)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_comfyuis_file_gives_the_same_text_without_a_configuration(
    flux2_source: Source, kind: TextKind
) -> None:
    texts = [
        open_text_encoder(flux2_source(kind, layout), CPU, torch.float32).encode(CAPTIONS["short"])["text"]
        for layout in ("diffusers", "comfyui")
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_read_when_their_turn_comes_give_the_same_text(
    flux2_source: Source, kind: TextKind, layout: Layout, dtype: torch.dtype
) -> None:
    source = flux2_source(kind, layout)
    streamed = open_streamed(source, CPU, dtype)
    whole = open_text_encoder(source, CPU, dtype)
    for caption in (CAPTIONS["short"], CAPTIONS["empty"]):
        text = streamed.encode(caption)["text"]
        assert text.dtype == dtype
        assert torch.equal(text, whole.encode(caption)["text"])
        assert all(parameter.is_meta for parameter in streamed._model.parameters())


def test_one_weight_is_in_memory_at_a_time_while_they_are_streamed(
    flux2_source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = open_streamed(flux2_source("mistral3", "diffusers"), CPU, torch.float32)
    most = 0

    def counted(weights: WeightsOnDisk, name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(not parameter.is_meta for parameter in encoder._model.parameters()))
        return weights._source.read(weights._keys[name], weights._dtype, weights._device)

    monkeypatch.setattr(WeightsOnDisk, "__getitem__", counted)
    encoder.encode("a red ball")
    assert most == 0, "weights of other modules were in memory when one was read"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_that_are_used_are_built_and_read(
    flux2_source: Source, kind: TextKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda files, key, *rest: read.append(key) or original(files, key, *rest)
    )
    encoder = open_text_encoder(flux2_source(kind, "diffusers"), CPU, torch.float32)
    layers = {"mistral3": 30, "qwen3": 27}[kind]
    assert len(encoder._model.layers) == layers
    assert not [key for key in read if f"layers.{layers}." in key or "vision" in key or "head" in key]
    assert len(read) == len(list(encoder._model.parameters()))


@pytest.mark.parametrize(("kind", "distance"), [("fp8", 0.3), ("int8", 0.1), ("nf4", 1.2)])
def test_quantized_layers_give_a_text_as_near_as_their_bits_allow(
    flux2_source: Source, kind: str, distance: float
) -> None:
    source = flux2_source("qwen3", "diffusers")
    whole = open_text_encoder(source, CPU, torch.float32).encode(CAPTIONS["short"])["text"]
    quantized = open_spread(source, lambda name: CPU, torch.float32, kind)
    text = quantized.encode(CAPTIONS["short"])["text"]
    # Random layers enlarge a difference from one to the next: 9 of them make nf4's 9 % almost anything.
    text, whole = text[:, :WIDTH], whole[:, :WIDTH]
    assert 0 < (text - whole).norm() / whole.norm() < distance
    assert isinstance(quantized._model.layers[3].mlp.up_proj, FrozenLinear)


def test_the_network_is_called_with_keywords_only(flux2_source: Source) -> None:
    """What transformers 5.8 changed: the positions of these arguments mean nothing any more."""
    encoder = open_text_encoder(flux2_source("mistral3", "diffusers"), CPU, torch.float32)
    calls: list[tuple[tuple[object, ...], set[str]]] = []
    encoder._model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, set(kwargs))), with_kwargs=True
    )
    encoder.encode("a red ball")
    assert calls == [((), {"input_ids", "attention_mask", "output_hidden_states", "use_cache"})]


def test_a_caption_that_is_too_long_is_cut_with_a_warning(
    flux2_source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = open_text_encoder(flux2_source("qwen3", "diffusers"), CPU, torch.float32)
    encoder.encode(CAPTIONS["short"])
    assert not caplog.records
    encoder.encode(CAPTIONS["long"])
    assert "is cut to 512: 'two yellow fish" in caplog.text


def test_the_identity_follows_weights_and_tokenizer_and_nothing_else(
    flux2_source: Source, tmp_path: Path
) -> None:
    source = flux2_source("qwen3", "comfyui")
    component, folder = source.text_encoder, shutil.copytree(source.tokenizer, tmp_path / "tokenizer")
    moved = Path(shutil.copy(component.files[0], tmp_path / "renamed.safetensors"))
    same = replace(source, text_encoder=replace(component, files=(moved,)), tokenizer=folder)
    assert text_identity(same) == text_identity(source)
    other = write_flux2_text_encoder(tmp_path / "other", "comfyui", "qwen3", seed=1)
    assert text_identity(replace(source, text_encoder=replace(component, files=(other,)))) != text_identity(
        source
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert text_identity(same) != text_identity(source)


def test_a_file_of_another_network_is_refused_in_one_line(flux2_source: Source, tmp_path: Path) -> None:
    source = flux2_source("qwen3", "comfyui")
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    wrong = replace(source, text_encoder=Component(files=(tmp_path / "other.safetensors",), layout="comfyui"))
    with pytest.raises(UserError, match=r"other\.safetensors: neither a Mistral-3 nor a Qwen3"):
        open_text_encoder(wrong, CPU, torch.float32)


def test_a_network_of_too_few_layers_is_refused(flux2_source: Source, tmp_path: Path) -> None:
    source = flux2_source("qwen3", "comfyui")
    tensors = load_file(source.text_encoder.files[0])
    short = {key: tensor for key, tensor in tensors.items() if "layers.2" not in key[:15]}
    save_file(short, tmp_path / "short.safetensors")
    wrong = replace(source, text_encoder=Component(files=(tmp_path / "short.safetensors",), layout="comfyui"))
    with pytest.raises(UserError, match=r"has 19 layers; Qwen3's hidden states are taken .* 9, 18, 27"):
        open_text_encoder(wrong, CPU, torch.float32)


def test_a_tokenizer_without_a_chat_template_is_refused(flux2_source: Source, tmp_path: Path) -> None:
    source = flux2_source("qwen3", "comfyui")
    folder = Path(shutil.copytree(source.tokenizer, tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        open_text_encoder(replace(source, tokenizer=folder), CPU, torch.float32)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer here"):
        open_text_encoder(replace(source, tokenizer=folder), CPU, torch.float32)


def test_eight_bit_files_of_comfyui_are_read(flux2_source: Source, tmp_path: Path) -> None:
    source = flux2_source("mistral3", "comfyui")
    tensors = load_file(source.text_encoder.files[0])
    name = "model.layers.4.mlp.up_proj"
    weight = tensors[f"{name}.weight"]
    scale = weight.abs().max() / 448
    tensors[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = scale
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    tensors[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, tmp_path / "fp8.safetensors")
    scaled = replace(source, text_encoder=Component(files=(tmp_path / "fp8.safetensors",), layout="comfyui"))
    whole, other, streamed = (
        open_it(which, CPU, torch.float32).encode(CAPTIONS["short"])["text"]
        for open_it, which in (
            (open_text_encoder, source),
            (open_text_encoder, scaled),
            (open_streamed, scaled),
        )
    )
    assert torch.equal(other, streamed)
    assert 0 < (other - whole).norm() / whole.norm() < 0.1


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_text_encoder_that_is_spread_gives_the_same_text(
    flux2_source: Source, quantize: str | None
) -> None:
    # For torch these are two devices, though their memory is one.
    near, far = CPU, torch.device("cpu:1")
    source = flux2_source("mistral3", "diffusers")

    def device_of(name: str) -> torch.device:
        return far if name.startswith(("layers.1", "layers.2", "norm")) else near

    whole = open_spread(source, lambda name: CPU, torch.float32, quantize)
    spread = open_spread(source, device_of, torch.float32, quantize)
    moved = [layer._hf_hook.execution_device for layer in spread._model.layers]
    assert moved == [far if str(index)[0] in "12" else near for index in range(30)]
    for caption in (CAPTIONS["short"], CAPTIONS["empty"]):
        assert torch.equal(spread.encode(caption)["text"], whole.encode(caption)["text"])


@pytest.mark.parametrize("opened", ["whole", "spread", "streamed"])
def test_a_text_encoder_leaves_nothing_behind(flux2_source: Source, opened: str) -> None:
    source = flux2_source("qwen3", "diffusers")
    if opened == "streamed":
        encoder = open_streamed(source, CPU, torch.float32)
    else:
        far = torch.device("cpu:1" if opened == "spread" else "cpu")
        encoder = open_spread(source, lambda name: far if "layers.2" in name else CPU, torch.float32)
    encoder.encode("a red ball")
    parts = [weakref.ref(encoder._model), *map(weakref.ref, encoder._model.parameters())]
    del encoder
    gc.collect()
    assert not [part for part in parts if part() is not None]


@pytest.mark.parametrize(
    ("network", "sizes", "config"),
    [
        (
            MISTRAL,
            {"vocabulary": 131072, "width": 5120, "hidden": 32768, "queries": 4096, "keys": 1024},
            {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
        ),
        (
            QWEN,
            {"vocabulary": 151936, "width": 2560, "hidden": 9728, "queries": 4096, "keys": 1024, "norm": 128},
            {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6},
        ),
    ],
    ids=["Mistral-3", "Qwen3-4B"],
)
def test_the_real_networks_configurations_follow_from_the_shapes_of_their_files(
    network: TextNetwork, sizes: dict[str, int], config: dict[str, object]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (sizes["vocabulary"], sizes["width"])}
    for index in range(network.num_layers):
        shapes[f"layers.{index}.mlp.gate_proj.weight"] = (sizes["hidden"], sizes["width"])
        shapes[f"layers.{index}.self_attn.q_proj.weight"] = (sizes["queries"], sizes["width"])
        shapes[f"layers.{index}.self_attn.k_proj.weight"] = (sizes["keys"], sizes["width"])
        if "norm" in sizes:
            shapes[f"layers.{index}.self_attn.q_norm.weight"] = (sizes["norm"],)
    assert text_network(shapes) is network
    found = network_config(network, Component(files=(Path("file"),), layout="comfyui"), shapes)
    assert {name: getattr(found, name) for name in config} == config
    assert found.rope_parameters["rope_theta"] == network.defaults["rope_theta"]
    model = build_network(network, found)
    assert model.layers[0].mlp.down_proj.weight.shape == (sizes["width"], sizes["hidden"])
    assert len(model.layers) == network.num_layers
