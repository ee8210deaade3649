"""Names in the UMT5 file of Wan's authors, and the same modules in transformers' `UMT5EncoderModel`."""

from __future__ import annotations

TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TIED = "encoder.embed_tokens.weight"  # a second name of shared.weight
_TOKENIZER = "spiece_model"  # the sentencepiece model that ComfyUI's files carry


def native_parameter_name(key: str) -> str:
    """Map a key of `models_t5_umt5-xxl-enc-bf16.pth`; a key that is not known stays as it is."""
    module, _, leaf = key.rpartition(".")
    if module.startswith("blocks."):
        _, index, part = module.split(".", 2)
        return f"encoder.block.{index}.{BLOCK.get(part, part)}.{leaf}"
    return f"{TOP.get(module, module)}.{leaf}"


def plain_parameter_name(key: str, *, has_shared: bool) -> str | None:
    """Map a key of a file with transformers' own names; None for keys that hold no weight of their own."""
    if key == _TIED:
        return None if has_shared else "shared.weight"
    return None if key == _TOKENIZER else key
