"""Keep the frozen weights of linear layers in 8 or 4 bits. Knows torch, and bitsandbytes for 4 bits."""

from tworeel.quant.scaled import FrozenFp8Linear, FrozenInt8Linear
from tworeel.quant.swap import KINDS, block_linears, quantize_blocks

__all__ = ["KINDS", "FrozenFp8Linear", "FrozenInt8Linear", "block_linears", "quantize_blocks"]
