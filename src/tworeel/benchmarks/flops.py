"""How much work a clip or an image is, and the least time that the devices need for it.

L tokens, T text tokens, width D, a multiplication and an addition counted as two operations: a linear layer
from A to B features takes 2 A B a token; attention of L queries to K keys 4 L K D, for q kᵀ and the product
with v.

A block of Wan, with feed-forward width E:

    linear layers     12 L D² + 4 T D² + 4 L D E    self-attention q k v o: 8 L D²; cross-attention
                                                    q o: 4 L D², k v: 4 T D²; feed-forward: 4 L D E
    attention         4 L² D + 4 L T D

A block of FLUX.2, with a feed-forward R (mlp_ratio, 3) times as wide as the model and gated: its first layer
has 2 R D outputs and its second one R D inputs. Image and text attend to each other and to themselves:

    linear layers     (8 + 6 R) (L + T) D²          q k v o: 8 D² a token; feed-forward: 4 R D² + 2 R D²
    attention         4 (L + T)² D

That is so of both kinds. A double block has weights of its own for image and text, each for its own tokens. A
single block has one set for all tokens and fuses the layers: q k v and the feed-forward's first is D to
3 D + 2 R D, (6 + 4 R) D² a token; o and its second one is D + R D to D, (2 + 2 R) D².

The backward of frozen linear layers is their input's gradient alone, as many operations as the forward (none
for the k and v of Wan's cross-attention: its text needs no gradient). That of attention is 2.5 times its
forward: a fused kernel computes five products instead of two, q kᵀ once more among them (FlashAttention-2,
https://arxiv.org/abs/2307.08691, section 4.1; `torch.utils.flop_counter` counts the same).

What is left out: the LoRA itself (rank 32: about 1 %), everything outside of the blocks (below 1 %), and what
is not a matrix product. Work that is done twice, as by recomputation, counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tworeel.benchmarks.widths import TEXT_TOKENS, Flux2Shape, ModelShape, WanShape

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


class _Block(NamedTuple):
    """Operations of a block's forward."""

    linear: int
    """Of linear layers that have a backward."""
    linear_once: int
    """Of those that have none."""
    attention: int


def work_of(model: ModelShape, tokens: int, blocks: int, text_tokens: int = TEXT_TOKENS) -> Work:
    """Operations of one micro-batch through `blocks` blocks; the formula is the module's."""
    block = _block_of(model, tokens, text_tokens)
    return Work(
        linear=float(blocks * (block.linear + block.linear_once)),
        attention=float(blocks * block.attention),
        backward=blocks * (block.linear + ATTENTION_BACKWARD * block.attention),
    )


def _block_of(model: ModelShape, tokens: int, text_tokens: int) -> _Block:
    width, joint = model.dim, tokens + text_tokens
    match model:
        case WanShape():
            return _Block(
                linear=12 * tokens * width**2 + 4 * tokens * width * model.ffn_dim,
                linear_once=4 * text_tokens * width**2,
                attention=4 * tokens * joint * width,
            )
        case Flux2Shape():
            return _Block(
                linear=(8 + 6 * model.mlp_ratio) * joint * width**2,
                linear_once=0,
                attention=4 * joint**2 * width,
            )
    raise NotImplementedError(f"no formula for a {type(model).__name__}")
