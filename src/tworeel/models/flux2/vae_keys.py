"""Names in the VAE file of FLUX.2's authors, and the same parameters in diffusers' `AutoencoderKLFlux2`.

Only the encoding half is named: the decoder's weights are never read.
"""

from __future__ import annotations

import re

_TOP = {"encoder.norm_out": "encoder.conv_norm_out", "encoder.quant_conv": "quant_conv"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_RESNET = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.(\w+)")
_DOWNSAMPLER = re.compile(r"encoder\.down\.(\d+)\.downsample\.conv")
_MIDDLE_RESNET = re.compile(r"encoder\.mid\.block_(\d)\.(\w+)")
_MIDDLE_ATTENTION = re.compile(r"encoder\.mid\.attn_1\.(\w+)")


def from_native(key: str) -> str:
    """Turn the authors' name of a parameter into diffusers'; diffusers' own stays as it is.

    >>> from_native("encoder.down.1.block.0.nin_shortcut.weight")
    'encoder.down_blocks.1.resnets.0.conv_shortcut.weight'
    """
    module, _, leaf = key.rpartition(".")
    return f"{_module(module)}.{leaf}"


def _module(name: str) -> str:
    if match := _RESNET.fullmatch(name):
        return f"encoder.down_blocks.{match[1]}.resnets.{match[2]}.{_resnet_layer(match[3])}"
    if match := _DOWNSAMPLER.fullmatch(name):
        return f"encoder.down_blocks.{match[1]}.downsamplers.0.conv"
    if match := _MIDDLE_RESNET.fullmatch(name):
        return f"encoder.mid_block.resnets.{int(match[1]) - 1}.{_resnet_layer(match[2])}"
    if match := _MIDDLE_ATTENTION.fullmatch(name):
        return f"encoder.mid_block.attentions.0.{_ATTENTION.get(match[1], match[1])}"
    return _TOP.get(name, name)


def _resnet_layer(name: str) -> str:
    return "conv_shortcut" if name == "nin_shortcut" else name
