"""Text encoders that are too large to stay on the first device beside its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from tworeel.engine.weight_streaming import to_host

_NAMES = ("text_encoder", "text_encoder_qwen3")
"""Of Wan's and FLUX.2's pipelines."""

_ASKED_FOR_THEIR_DEVICE = ["T5RelativeEmbedding"]
"""Modules that look where a layer of theirs is, before they call it."""


def text_encoders(pipe: Any) -> Iterator[nn.Module]:
    """The frozen ones of a pipeline, but for those that DiffSynth reads from disk or casts for each use."""
    for name in _NAMES:
        encoder = getattr(pipe, name, None)
        if not isinstance(encoder, nn.Module) or getattr(encoder, "vram_management_enabled", False):
            continue
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            yield encoder


def waiting_bytes(pipe: Any) -> int:
    """Of the text encoders whose weights are in host memory."""
    tensors = (tensor for encoder in text_encoders(pipe) for tensor in encoder.parameters())
    return sum(tensor.nbytes for tensor in tensors if tensor.is_meta)


def keep_in_host_memory(encoder: nn.Module, device: torch.device) -> None:
    """Let an encoder compute on a device with its weights in host memory, layer by layer.

    Args:
        encoder: frozen, in host memory. It stays there when its pipeline is moved.
        device: where it computes; its buffers go there.
    """
    if device.type != "cpu":
        # Into pinned memory, from where each use copies it several times as fast.
        layers = (module for module in encoder.modules() if not any(module.children()))
        to_host(dict(enumerate(layers)), device)
    cpu_offload(encoder, device, preload_module_classes=_ASKED_FOR_THEIR_DEVICE)
    encoder._apply = MethodType(lambda self, fn, recurse=True: self, encoder)  # type: ignore[method-assign]
