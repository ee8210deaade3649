"""The language models whose hidden states are FLUX.2's text: Mistral-3 for dev, Qwen3 for klein.

Only the layers up to the last one that is used exist here; what lies above them (further layers, the last
norm, the head, the vision tower) is neither built nor read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MistralConfig,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)

from tworeel.errors import UserError
from tworeel.models.family import Component
from tworeel.weights.tensor_files import TensorInfo

Shapes = Mapping[str, tuple[int, ...]]

LAYERS = "layers"
"""The list of layers in each of the networks."""

# `model.` in ComfyUI's and Qwen3's files, `language_model.model.` in Mistral-3's, the words the other way
# round in what newer versions of transformers write.
_PREFIX = re.compile(r"(?:model\.|language_model\.)*")
_UNUSED = re.compile(
    r"(norm|lm_head)\.|tekken_model$|(vision_|multi_modal_projector\.|patch_merger\.|pre_mm_projector_norm\.)"
)
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class TextNetwork:
    """One kind of language model, and which of its hidden states are taken."""

    title: str
    hidden_states: tuple[int, ...]
    """Layers behind which they are taken; their widths add up to the transformer's `joint_attention_dim`."""
    config_class: type[PreTrainedConfig]
    model_class: Callable[[Any], PreTrainedModel]
    defaults: Mapping[str, Any]
    """What the shapes do not tell, for files without a configuration."""
    example: str
    """A file of ComfyUI's that holds it."""
    repository: str
    """One that has its tokenizer in diffusers' layout."""

    @property
    def num_layers(self) -> int:
        """Layers that are run."""
        return self.hidden_states[-1]


MISTRAL = TextNetwork(
    title="Mistral-3",
    hidden_states=(10, 20, 30),
    config_class=MistralConfig,
    model_class=MistralModel,
    defaults={"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None},
    example="mistral_3_small_flux2_bf16.safetensors",
    repository="black-forest-labs/FLUX.2-dev",
)
QWEN = TextNetwork(
    title="Qwen3",
    hidden_states=(9, 18, 27),
    config_class=Qwen3Config,
    model_class=Qwen3Model,
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e6},
    example="qwen_3_4b.safetensors",
    repository="black-forest-labs/FLUX.2-klein-4B",
)


def text_network(shapes: Shapes) -> TextNetwork | None:
    """Tell which of the networks a file holds; None for another one.

    Args:
        shapes: by `plain_name`.
    """
    if "embed_tokens.weight" not in shapes or "layers.0.self_attn.q_proj.weight" not in shapes:
        return None
    return QWEN if "layers.0.self_attn.q_norm.weight" in shapes else MISTRAL


def plain_name(key: str) -> str | None:
    """Return a key without what stands before it in some files; None for what is not used at any depth."""
    name = key[_PREFIX.match(key).end() :]  # type: ignore[union-attr]  # it matches the empty string
    return None if _UNUSED.match(name) else name


def plain_shapes(names: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by `plain_name`."""
    return {name: info.shape for key, info in names.items() if (name := plain_name(key)) is not None}


def parameter_name(key: str, network: TextNetwork) -> str | None:
    """Turn a key of a file into a parameter of `build_network`'s; None for what that does not have."""
    name = plain_name(key)
    layer = _LAYER.match(name or "")
    return None if layer and int(layer[1]) >= network.num_layers else name


def network_config(network: TextNetwork, component: Component, shapes: Shapes) -> PreTrainedConfig:
    """Return the network's configuration: what config.json says, or what the shapes tell.

    Raises:
        UserError: the file has fewer layers than are used, or shapes of another network.
    """
    count = len({layer[1] for name in shapes if (layer := _LAYER.match(name))})
    if count < network.num_layers:
        raise UserError(
            f"{component.files[0]}: has {count} layers; {network.title}'s hidden states are taken "
            f"behind layers {', '.join(map(str, network.hidden_states))}"
        )
    # A multimodal network describes its language model in a table of its own.
    described = component.config.get("text_config", component.config)
    config = dict(described) if described else _config_from_shapes(network, component, shapes)
    return network.config_class.from_dict(
        config | {"num_hidden_layers": network.num_layers} | _cut(config, network)
    )


def _cut(config: Mapping[str, Any], network: TextNetwork) -> dict[str, Any]:
    """Shorten what a configuration says layer by layer."""
    types = config.get("layer_types")
    return {"layer_types": types[: network.num_layers]} if types else {}


def _config_from_shapes(network: TextNetwork, component: Component, shapes: Shapes) -> dict[str, Any]:
    first = "layers.0"
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        hidden = shapes[f"{first}.mlp.gate_proj.weight"][0]
        queries, keys = (shapes[f"{first}.self_attn.{part}_proj.weight"][0] for part in "qk")
        norm = shapes.get(f"{first}.self_attn.q_norm.weight")
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{component.files[0]}: not a {network.title} (its first layer is missing or misshaped)"
        ) from None
    head = norm[0] if norm else network.defaults["head_dim"]
    return {
        **network.defaults,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "head_dim": head,
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
    }


def build_network(network: TextNetwork, config: PreTrainedConfig) -> PreTrainedModel:
    """Make the network on the meta device; its rotary tables are real."""
    with init_empty_weights(include_buffers=False):
        model = network.model_class(config)
    # The last hidden state that is used lies before the norm: in the whole network more layers follow.
    model.norm = nn.Identity()
    return model.eval()
