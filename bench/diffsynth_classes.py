"""DiffSynth's encoders, smaller: its own classes have no options for it, and it finds classes by name."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.models.flux2_text_encoder import Flux2TextEncoder
from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE
from transformers import Mistral3ForConditionalGeneration

LAST_READ = 30
"""Hidden state of Mistral-3 that FLUX.2 reads last."""
_NARROW: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
_NARROW_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 16,
}


class NarrowVAE(WanVideoVAE):
    """Wan's VAE with its strides and channels of latents, but of few channels within."""

    def __init__(self) -> None:
        super().__init__()
        self.model = VideoVAE_(dim=8, z_dim=self.z_dim).eval().requires_grad_(False)


class CutMistral(Flux2TextEncoder):
    """Mistral-3 of fewer layers; the hidden states of those that are missing are that of the last one."""

    def __init__(self, layers: int, *, narrow: bool = False) -> None:
        with torch.device("meta"):
            config = Flux2TextEncoder().config
        config.text_config.num_hidden_layers = layers
        for part, sizes in ((config.text_config, _NARROW), (config.vision_config, _NARROW_VISION)):
            for name, value in sizes.items() if narrow else ():
                setattr(part, name, value)
        Mistral3ForConditionalGeneration.__init__(self, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not DiffSynth's own forward, which fails with transformers 5 (src/tworeel/diffsynth/package.py).
        output = Mistral3ForConditionalGeneration.forward(self, *args, **kwargs)
        states = tuple(output.hidden_states)
        output.hidden_states = states + states[-1:] * (LAST_READ + 1 - len(states))
        return output
