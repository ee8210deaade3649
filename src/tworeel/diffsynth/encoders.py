"""Text encoders that are too large to stay on the first device beside its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from tworeel.engine.weight_streaming import HostWeights, to_host

_NAMES = ("text_encoder", "text_encoder_qwen3")
"""Of Wan's and FLUX.2's pipelines."""

_LOOK_INSIDE = ("T5RelativeEmbedding",)
"""Modules that ask a layer of theirs where it is, before they call it."""


def text_encoders(pipe: Any) -> Iterator[nn.Module]:
    """Those of a pipeline, but for those that DiffSynth itself reads from disk or casts for each use."""
    for name in _NAMES:
        encoder = getattr(pipe, name, None)
        if isinstance(encoder, nn.Module) and not getattr(encoder, "vram_management_enabled", False):
            yield encoder


def is_trained(encoder: nn.Module) -> bool:
    """Whether anything of it is."""
    return any(parameter.requires_grad for parameter in encoder.parameters())


def waiting_bytes(pipe: Any) -> int:
    """Of the text encoders whose weights are in host memory."""
    waiting = (encoder for encoder in text_encoders(pipe) if "_apply" in vars(encoder))
    return sum(tensor.nbytes for encoder in waiting for tensor in encoder.parameters())


def keep_in_host_memory(encoder: nn.Module, device: torch.device) -> None:
    """Let an encoder compute on a device with its weights in pinned host memory: a layer's come when it runs.

    accelerate's `cpu_offload` empties torch's cache after each of them, which other devices' work must not
    meet.

    Args:
        encoder: frozen. It stays there when its pipeline is moved.
        device: where it computes; its buffers go there.
    """
    layers = list(_layers(encoder))
    for layer, weights in zip(layers, to_host(dict(enumerate(layers)), device).values(), strict=True):
        _bring_when_used(layer, weights, device)
    for module in encoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    encoder._apply = MethodType(lambda self, fn, recurse=True: self, encoder)  # type: ignore[method-assign]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What is brought at a time: modules with parameters of their own."""
    has_own = next(module.parameters(recurse=False), None) is not None
    if has_own or type(module).__name__ in _LOOK_INSIDE:
        yield module
        return
    for child in module.children():
        yield from _layers(child)


def _bring_when_used(layer: nn.Module, weights: HostWeights, device: torch.device) -> None:
    def bring(*_: Any) -> None:
        weights.point_to(weights.host.to(device, non_blocking=True))

    def let_go(*_: Any) -> None:
        weights.point_to(weights.host)

    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(let_go)
