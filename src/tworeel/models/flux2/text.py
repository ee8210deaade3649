"""FLUX.2's text: hidden states of a large language model, concatenated.

Shape letters: L tokens (512, padding included: the transformer reads it too), D width of the language model;
the text is 3 · D = `joint_attention_dim` wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from transformers import PreTrainedModel

from tworeel.errors import UserError
from tworeel.models.family import Component, ModelSource
from tworeel.models.flux2.text_networks import (
    LAYERS,
    TextNetwork,
    build_network,
    network_config,
    parameter_name,
    plain_shapes,
    text_network,
)
from tworeel.models.flux2.text_streaming import stream_from_disk
from tworeel.models.flux2.text_tokens import TOKENIZER_FILES, CaptionTokenizer, open_tokenizer
from tworeel.quant import block_linears, quantize_blocks
from tworeel.weights.loading import check_weights, load_weights
from tworeel.weights.tensor_files import TensorFiles

# Raise this when the encoder returns something else for the same files.
TEXT_FORMAT = "flux2-text-1"
STREAMED_BATCH = 8
"""Captions that share one reading of all weights; with Mistral-3 in bf16 their hidden states take 2 GB."""


class Flux2TextEncoder:
    """Embeds captions as diffusers' FLUX.2 pipelines embed prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: CaptionTokenizer,
        hidden_states: tuple[int, ...],
        device: torch.device,
        batch_size: int = 1,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._hidden_states = hidden_states
        self._device = device
        self.batch_size = batch_size

    def encode(self, caption: str) -> dict[str, Tensor]:
        """Embed one caption.

        Returns:
            `text`: shape (L, 3 · D) on the CPU, in the encoder's dtype.
        """
        return self.encode_batch([caption])[0]

    @torch.no_grad()
    def encode_batch(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Embed several captions at a time."""
        tokens = [self._tokenizer.tokens(caption) for caption in captions]
        # Keywords only: transformers 5.8 did away with the positions of these arguments.
        output = self._model(
            **{name: torch.cat([t[name] for t in tokens]).to(self._device) for name in tokens[0]},
            output_hidden_states=True,
            use_cache=False,
        )
        taken = torch.cat([output.hidden_states[index].cpu() for index in self._hidden_states], dim=-1)
        return [{"text": text.clone()} for text in taken]


def open_text_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Flux2TextEncoder:
    """Load the text encoder, whole, onto one device.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    return open_spread(source, lambda name: device, dtype)


def open_spread(
    source: ModelSource,
    device_of: Callable[[str], torch.device],
    dtype: torch.dtype,
    quantize: str | None = None,
) -> Flux2TextEncoder:
    """Load the text encoder onto one or several devices.

    Args:
        source: the model.
        device_of: name of a child (`embed_tokens`, `layers.7`, `rotary_emb`) or of anything in it -> device;
            captions go in where the embedding is.
        dtype: of the weights and the computation.
        quantize: keep the layers' linear weights in this form (`tworeel.quant.KINDS`).

    Raises:
        UserError: as `open_text_encoder`.
    """
    parts = _Parts(source)
    model = parts.model
    if quantize is not None:
        quantize_blocks(model, quantize, block_linears(model, (LAYERS,)))
    load_weights(model, parts.files, parts.name_of, device_of=device_of, dtype_of=lambda name: dtype)
    first = device_of("embed_tokens")
    places = [device_of(f"{LAYERS}.{index}") for index in range(parts.network.num_layers)]
    if {*places} != {first}:
        for index, place in enumerate(places):
            # Brings what comes out of the layer before to its device.
            add_hook_to_module(model.get_submodule(f"{LAYERS}.{index}"), AlignDevicesHook(place))
    return parts.encoder(model, first)


def open_streamed(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Flux2TextEncoder:
    """Open the text encoder without loading it: each weight is read when its turn comes, and dropped again.

    Raises:
        UserError: as `open_text_encoder`.
    """
    parts = _Parts(source)
    check_weights(parts.model, parts.files, parts.name_of)
    keys = {name: key for key in parts.files.names if (name := parts.name_of(key)) is not None}
    stream_from_disk(parts.model, parts.files, keys, device, dtype)
    return parts.encoder(parts.model, device, batch_size=STREAMED_BATCH)


class _Parts:
    """What every way to open the text encoder begins with."""

    def __init__(self, source: ModelSource) -> None:
        component, self._tokenizer = text_parts(source)
        self.files = TensorFiles(*component.files)
        shapes = plain_shapes(self.files.names)
        self.network = known_network(component, self.files)
        self.model = build_network(self.network, network_config(self.network, component, shapes))

    def name_of(self, key: str) -> str | None:
        return parameter_name(key, self.network)

    def encoder(self, model: PreTrainedModel, device: torch.device, batch_size: int = 1) -> Flux2TextEncoder:
        tokenizer = open_tokenizer(self._tokenizer, self.network)
        return Flux2TextEncoder(model, tokenizer, self.network.hidden_states, device, batch_size)


def known_network(component: Component, files: TensorFiles) -> TextNetwork:
    """Tell which language model the files hold.

    Raises:
        UserError: they hold another network.
    """
    network = text_network(plain_shapes(files.names))
    if network is None:
        raise UserError(f"{component.files[0]}: neither a Mistral-3 nor a Qwen3 language model")
    return network


def text_parts(source: ModelSource) -> tuple[Component, Path]:
    """Return the text encoder and its tokenizer."""
    assert source.text_encoder is not None, "locate reports a missing text encoder"
    assert source.tokenizer is not None, "locate reports a missing tokenizer"
    return source.text_encoder, source.tokenizer


def text_identity(source: ModelSource) -> str:
    """Hash what decides the embedding of a caption: the text encoder and its tokenizer."""
    component, tokenizer = text_parts(source)
    with TensorFiles(*component.files) as files:
        parts = [TEXT_FORMAT, files.fingerprint(), repr(sorted(_settings(component).items()))]
    files_of = {name: tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
    parts += [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files_of.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _settings(component: Component) -> dict[str, object]:
    """What a configuration says of the computation, not of who wrote it with which version."""
    described = component.config.get("text_config", component.config)
    return {
        key: described[key] for key in ("rms_norm_eps", "rope_theta", "rope_parameters") if key in described
    }
