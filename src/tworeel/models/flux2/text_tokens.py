"""Captions as the chat messages that FLUX.2's language models read, in exactly 512 tokens.

Shape letters: L tokens (512).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tworeel.errors import UserError
from tworeel.models.flux2.text_networks import QWEN, TextNetwork

MAX_TOKENS = 512
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What decides the tokens of a caption."""

_PADDED = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}

log = logging.getLogger(__name__)


class CaptionTokenizer:
    """Makes of a caption what diffusers' pipelines make of a prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, network: TextNetwork) -> None:
        self._tokenizer = tokenizer
        self._network = network

    def tokens(self, caption: str) -> Mapping[str, Tensor]:
        """Return `input_ids` and `attention_mask`, shape (1, L): padded, or cut if there are too many."""
        text = self._chat(caption)
        self._warn_if_too_long(text, caption)
        tokens = self._tokenizer(text, add_special_tokens=self._adds_special_tokens(text), **_PADDED)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _adds_special_tokens(self, text: str) -> bool:
        # As transformers' processors decide: Mistral's template has the first token in it already.
        first = self._tokenizer.bos_token
        return self._network is QWEN or first is None or not text.startswith(first)

    def _chat(self, caption: str) -> str:
        is_qwen = self._network is QWEN
        messages: list[Any] = [_message("user", caption)] if is_qwen else _parted_messages(caption)
        options: dict[str, Any] = {"enable_thinking": False} if is_qwen else {}
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_qwen, **options
        )
        assert isinstance(text, str)
        return text

    def _warn_if_too_long(self, text: str, caption: str) -> None:
        special = self._adds_special_tokens(text)
        count = len(self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
        if count > MAX_TOKENS:
            log.warning("caption of %d tokens is cut to %d: '%s…'", count, MAX_TOKENS, caption[:60])


def _parted_messages(caption: str) -> list[dict[str, object]]:
    """Mistral-3's messages are lists of parts, and it is told first what to do."""
    # In a caption this word would stand for an image, of which there is none.
    said = {"system": SYSTEM_MESSAGE, "user": caption.replace("[IMG]", "")}
    return [_message(role, [{"type": "text", "text": text}]) for role, text in said.items()]


def _message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def open_tokenizer(folder: Path, network: TextNetwork) -> CaptionTokenizer:
    """Open the tokenizer in a folder.

    Raises:
        UserError: the folder holds no tokenizer, a damaged one or none that knows how a chat is written.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{folder}: no tokenizer here (looked for {TOKENIZER_FILE})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.chat_template = tokenizer.chat_template or _template_of_processor(folder)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {reason})"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template (chat_template.jinja); take the one in "
            "the model's own repository"
        )
    return CaptionTokenizer(tokenizer, network)


def _template_of_processor(folder: Path) -> str | None:
    """Older repositories keep the template where only the processor looks for it."""
    file = folder / "chat_template.json"
    return json.loads(file.read_text(encoding="utf-8"))["chat_template"] if file.is_file() else None
