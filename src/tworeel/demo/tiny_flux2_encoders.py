"""Tiny text encoders for FLUX.2 with random weights, written as real checkpoints are: same names and keys.

The numbers of layers are those that FLUX.2 needs, widths are not; all weights are fp32. The same seed gives
the same values in each layout:

- `diffusers`: `text_encoder/` and `tokenizer/`;
- `comfyui`: one safetensors file, and the tokenizer in `tokenizer/`, which ComfyUI brings along itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tworeel.models.family import Layout

TextKind = Literal["mistral3", "qwen3"]

WIDTH = 32
"""Of the language models; a transformer that reads them has `joint_attention_dim = 96`."""
VOCABULARY = 512
COMFYUI_FILES: dict[TextKind, str] = {
    "mistral3": "mistral_3_small_flux2_bf16.safetensors",
    "qwen3": "qwen_3_4b.safetensors",
}

_LAYERS: dict[TextKind, int] = {"mistral3": 32, "qwen3": 29}
"""Some more than the 30 and 27 that are used, as in the real ones."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    # Of a size to which 30 layers add something: with the usual 0.02 all hidden states would be alike.
    "initializer_range": 0.2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}

_SPECIAL: dict[TextKind, tuple[str, ...]] = {
    "mistral3": ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
}
_ROLES: dict[TextKind, dict[str, str]] = {
    "mistral3": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
_PADDING_SIDE: dict[TextKind, str] = {"mistral3": "left", "qwen3": "right"}
_TEMPLATES: dict[TextKind, str] = {
    "mistral3": (
        "{{ bos_token }}{% for message in messages %}"
        "{% set word = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
        "[{{ word }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ word }}]{% endfor %}"
    ),
    "qwen3": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
}
_TEXTS = (
    "a red ball rolls over a green hill",
    "the small cat sleeps beside a warm stone on the dark floor",
    "an old dog jumps over the quiet street, and two yellow fish turn slowly above a deep lake",
)


def tiny_text_model(kind: TextKind, *, seed: int = 0) -> PreTrainedModel:
    """Build the whole network that diffusers' pipeline is given: with head, and Mistral-3's vision tower."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "mistral3":
            # 128 is a width of Mistral's heads that no tensor's shape tells.
            text = {**_SIZES, "model_type": "mistral", "num_hidden_layers": _LAYERS[kind], "head_dim": 128}
            text |= {"rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None}
            vision = {**_VISION, "model_type": "pixtral"}
            config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
            return Mistral3ForConditionalGeneration(config).eval()
        rope = {"rope_type": "default", "rope_theta": 1e6}
        sizes = _SIZES | {"num_hidden_layers": _LAYERS[kind], "head_dim": 16}
        return Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=True)).eval()


def write_flux2_text_encoder(folder: Path, layout: Layout, kind: TextKind, *, seed: int = 0) -> Path:
    """Write the language model; return its folder, or ComfyUI's file."""
    model = tiny_text_model(kind, seed=seed)
    if layout == "diffusers":
        model.save_pretrained(folder / "text_encoder", max_shard_size="600KB")
        return folder / "text_encoder"
    path = folder / COMFYUI_FILES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(_comfyui_keys(model.state_dict(), kind)), path, metadata={"format": "pt"})
    return path


def _comfyui_keys(tensors: Mapping[str, Tensor], kind: TextKind) -> Iterator[tuple[str, Tensor]]:
    """ComfyUI's files hold the language model alone; Mistral-3's ends with the last layer that is used."""
    for name, tensor in tensors.items():
        bare = name.replace("language_model.", "")
        if "vision_tower" in name or "multi_modal" in name or "lm_head" in name:
            continue
        if kind == "mistral3" and (bare.startswith(("model.layers.30.", "model.layers.31.", "model.norm."))):
            continue
        yield bare, tensor.clone()
    if kind == "mistral3":
        yield "tekken_model", torch.zeros(8, dtype=torch.uint8)


def write_flux2_tokenizer(folder: Path, kind: TextKind) -> Path:
    """Write the tokenizer of the tiny text encoder, with a chat template; return its folder.

    It is a byte-level BPE, as the real ones are, trained on a few words that are made up here.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL[kind]),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=_PADDING_SIDE[kind],
        chat_template=_TEMPLATES[kind],
        **_ROLES[kind],
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
