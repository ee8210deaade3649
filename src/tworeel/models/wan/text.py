"""Wan's text encoder: UMT5 embeddings of captions, and the sentencepiece tokenizer in front of it.

Shape letters: L tokens of the caption (at most 512), D width.
"""

from __future__ import annotations

import html
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tworeel.errors import UserError
from tworeel.models.family import Component
from tworeel.models.wan.text_keys import native_parameter_name, plain_parameter_name
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

MAX_TOKENS = 512
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_EMBEDDED = "spiece_model"

log = logging.getLogger(__name__)


class WanTextEncoder:
    """Embeds captions as Wan was trained with them."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: T5Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, caption: str) -> dict[str, Tensor]:
        """Embed one caption.

        Returns:
            `text`: shape (L, D) on the CPU, in the encoder's dtype, without padding.
        """
        text = clean_caption(caption)
        self._warn_if_too_long(text)
        # Padding first and cutting afterwards is what inference does; the sums come out bit for bit the same.
        tokens = self._tokenizer(
            text, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask
        device = self._model.shared.weight.device
        embedded = self._model(tokens.input_ids.to(device), mask.to(device)).last_hidden_state
        return {"text": embedded[0, : int(mask.sum())].cpu()}

    def _warn_if_too_long(self, text: str) -> None:
        count = len(self._tokenizer(text, verbose=False).input_ids)
        if count > MAX_TOKENS:
            log.warning("caption of %d tokens is cut to %d: '%s…'", count, MAX_TOKENS, text[:60])


def clean_caption(caption: str) -> str:
    """Mend mojibake, resolve HTML entities (twice: some are escaped twice) and collapse white space."""
    import ftfy  # takes a quarter of a second, and most commands read no caption

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


def open_umt5(
    component: Component, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> WanTextEncoder:
    """Load UMT5 and its tokenizer from any layout.

    Raises:
        UserError: a file is damaged, or holds another network.
    """
    files = TensorFiles(*component.files)
    model = build_text_model(text_config(component, files.names))
    name_of = text_parameter_name(files.names)
    load_weights(model, files, name_of, device_of=lambda name: device, dtype_of=lambda name: dtype)
    return WanTextEncoder(model.eval(), open_tokenizer(tokenizer))


def build_text_model(config: Mapping[str, Any]) -> UMT5EncoderModel:
    """Make the encoder on the meta device."""
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def text_parameter_name(names: Iterable[str]) -> Callable[[str], str | None]:
    """Return the function from a text encoder file's keys to `UMT5EncoderModel`'s parameters.

    Args:
        names: all keys of the file; they tell whose names they are.
    """
    names = set(names)
    if "token_embedding.weight" in names:
        return native_parameter_name
    has_shared = "shared.weight" in names
    return lambda key: plain_parameter_name(key, has_shared=has_shared)


def text_config(component: Component, names: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return `UMT5Config`'s arguments: the folder's config.json, or what the shapes tell."""
    if component.config:
        return dict(component.config)
    name_of = text_parameter_name(names)
    shapes = {name_of(key): info.shape for key, info in names.items()}
    first = "encoder.block.0.layer"
    try:
        vocabulary, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
        inner = shapes[f"{first}.0.SelfAttention.q.weight"][0]
        hidden = shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0]
    except (KeyError, ValueError):
        raise UserError(
            f"{component.files[0]}: not a UMT5 encoder (its first block is missing or misshaped)"
        ) from None
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": sum(str(name).endswith(".layer.0.layer_norm.weight") for name in shapes),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def open_tokenizer(path: Path) -> T5Tokenizer:
    """Open the tokenizer in a folder, or the sentencepiece model inside a ComfyUI text encoder file.

    Raises:
        UserError: the folder or the file holds no tokenizer, or a damaged one.
    """
    if path.is_dir():
        return _open_tokenizer_folder(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spiece.model").write_bytes(embedded_sentencepiece(path))
        return _open_tokenizer_folder(Path(folder))


def embedded_sentencepiece(path: Path) -> bytes:
    """Return the sentencepiece model that a ComfyUI text encoder file carries in a uint8 tensor."""
    with TensorFiles(path) as files:
        if _EMBEDDED not in files.names:
            raise UserError(f"{path}: holds no tokenizer ('{_EMBEDDED}'); set model.tokenizer to its folder")
        return files.read(_EMBEDDED).numpy().tobytes()


def _open_tokenizer_folder(folder: Path) -> T5Tokenizer:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer here (looked for {' and '.join(TOKENIZER_FILES)})")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library that reads it raises no narrower one
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {reason})"
        ) from error
