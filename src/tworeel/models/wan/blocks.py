"""Wan's blocks where they are not compiled: diffusers' numbers, with less memory.

Diffusers' block keeps an fp32 copy of its hidden state for each norm, of the modulation too if each token has
its own, and its rotary embedding writes every second number at a time. Compiled, that is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
)
from torch import Tensor, nn

from tworeel.engine.lean import Lean
from tworeel.models.wan.lean_functions import Modulation, gated, modulated, normed, rotated

SHIFT, SCALE, GATE, FF_SHIFT, FF_SCALE, FF_GATE = range(6)
"""Rows of a block's modulation, in the order of `WanTransformerBlock.forward`."""
SMALLEST = 2**24
"""Numbers of a hidden state that is worth it: with fewer there is little memory to save, and our functions
take the host longer."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of hidden states whose sums and products are in fp32."""


class LeanBlock(Lean, WanTransformerBlock):
    """A block of Wan."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
    ) -> Tensor:
        """As diffusers' forward.

        Args:
            hidden_states: of shape (B, tokens, width).
            encoder_hidden_states: the text, (B, text tokens, width).
            temb: modulation of all tokens, (B, 6, width), or of each, (B, tokens, 6, width).
            rotary_emb: cosines and sines, (1, tokens, 1, head width).
        """
        if not (self.is_lean and _is_worth_it(hidden_states)) or self._needs_its_norms(temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        modulation = Modulation.of(self.scale_shift_table, temb)

        given = modulated(self.norm1, hidden_states, modulation, SHIFT, SCALE)
        hidden_states = gated(hidden_states, self.attn1(given, None, None, rotary_emb), modulation, GATE)

        if isinstance(self.norm2, nn.LayerNorm):
            given = normed(self.norm2, hidden_states)
        else:
            given = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(given, encoder_hidden_states, None, None)

        given = modulated(self.norm3, hidden_states, modulation, FF_SHIFT, FF_SCALE)
        return gated(hidden_states, self.ffn(given), modulation, FF_GATE)

    def _needs_its_norms(self, temb: Tensor) -> bool:
        """Whether they or the modulation are trained, or someone listens to the norms."""
        trained = (temb, self.scale_shift_table, *self.norm2.parameters())
        return any(one.requires_grad for one in trained) or any(
            norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
            for norm in (self.norm1, self.norm2, self.norm3)
        )


class LeanSelfAttention(Lean, WanAttention):
    """A self-attention of Wan."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As diffusers' forward; arguments as `LeanBlock`'s."""
        processor: Any = self.processor
        plain = type(processor) is WanAttnProcessor and not self.fused_projections and not kwargs
        is_lean = self.is_lean and plain and _is_worth_it(hidden_states)
        if not is_lean or rotary_emb is None or encoder_hidden_states is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        query = self.norm_q(self.to_q(hidden_states)).unflatten(2, (self.heads, -1))
        key = self.norm_k(self.to_k(hidden_states)).unflatten(2, (self.heads, -1))
        value = self.to_v(hidden_states).unflatten(2, (self.heads, -1))
        query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        out, dropout = self.to_out
        result: Tensor = dropout(out(attended.flatten(2, 3).type_as(query)))
        return result


def _is_worth_it(hidden: Tensor) -> bool:
    return hidden.dtype in _DTYPES and hidden.numel() >= SMALLEST


def use_lean_blocks(model: nn.Module) -> None:
    """Let the blocks of diffusers' `WanTransformer3DModel` run so."""
    for module in model.modules():
        if type(module) is WanTransformerBlock:
            module.__class__ = LeanBlock
            module.attn1.__class__ = LeanSelfAttention
