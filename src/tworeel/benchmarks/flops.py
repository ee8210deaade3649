"""How much work a clip is, and the least time that the devices need for it.

Of a block with L tokens, T text tokens, width D and feed-forward width E, a multiplication and an addition
counted as two operations:

    linear layers     12 L D² + 4 T D² + 4 L D E    self-attention q k v o: 8 L D²; cross-attention
                                                    q o: 4 L D², k v: 4 T D²; feed-forward: 4 L D E
    attention         4 L² D + 4 L T D              q kᵀ and the product with v, each 2 L × keys × D

The backward of frozen linear layers is their input's gradient alone, as many operations as the forward (none
for cross-attention's k and v: text needs no gradient). That of attention is 2.5 times its forward: a fused
kernel computes five products instead of two, q kᵀ once more among them (FlashAttention-2,
https://arxiv.org/abs/2307.08691, section 4.1; `torch.utils.flop_counter` counts the same).

What is left out: the LoRA itself (rank 32: about 1 %), everything outside of the blocks (below 1 %), and what
is not a matrix product. Work that is done twice, as by recomputation, counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tworeel.benchmarks.shapes import TEXT_TOKENS, ModelShape

ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of one micro-batch."""

    linear: float
    """Linear layers, forward."""
    attention: float
    """Attention, forward."""
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.linear + self.attention + self.backward


def work_of(model: ModelShape, tokens: int, blocks: int, text_tokens: int = TEXT_TOKENS) -> Work:
    """Operations of one micro-batch through `blocks` blocks; the formula is the module's."""
    width, hidden = model.dim, model.ffn_dim
    from_tokens = 12 * tokens * width**2 + 4 * tokens * width * hidden
    from_text = 4 * text_tokens * width**2
    attention = 4 * tokens * (tokens + text_tokens) * width
    return Work(
        linear=float(blocks * (from_tokens + from_text)),
        attention=float(blocks * attention),
        backward=blocks * (from_tokens + ATTENTION_BACKWARD * attention),
    )
