"""Names in the VAE file of FLUX.2's authors, and the same parameters in diffusers' `AutoencoderKLFlux2`."""

from __future__ import annotations

import re

_TOP = {
    "encoder.norm_out": "encoder.conv_norm_out",
    "decoder.norm_out": "decoder.conv_norm_out",
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_RESNET = re.compile(r"(en|de)coder\.(up|down)\.(\d+)\.block\.(\d+)\.(\w+)")
_SAMPLER = re.compile(r"(en|de)coder\.(up|down)\.(\d+)\.(?:up|down)sample\.conv")
_MIDDLE_RESNET = re.compile(r"(en|de)coder\.mid\.block_(\d)\.(\w+)")
_MIDDLE_ATTENTION = re.compile(r"(en|de)coder\.mid\.attn_1\.(\w+)")


def from_native(key: str, stages: int) -> str:
    """Turn the authors' name of a parameter into diffusers'; diffusers' own stays as it is.

    Args:
        key: of the file.
        stages: resolutions of the network; the authors count the decoder's from the last one.

    >>> from_native("encoder.down.1.block.0.nin_shortcut.weight", 4)
    'encoder.down_blocks.1.resnets.0.conv_shortcut.weight'
    >>> from_native("decoder.up.3.block.0.norm1.weight", 4)
    'decoder.up_blocks.0.resnets.0.norm1.weight'
    """
    module, _, leaf = key.rpartition(".")
    return f"{_module(module, stages)}.{leaf}"


def _module(name: str, stages: int) -> str:
    if match := _RESNET.fullmatch(name):
        half, way, stage, block, layer = match.groups()
        return f"{half}coder.{_stage(way, stage, stages)}.resnets.{block}.{_resnet_layer(layer)}"
    if match := _SAMPLER.fullmatch(name):
        half, way, stage = match.groups()
        return f"{half}coder.{_stage(way, stage, stages)}.{way}samplers.0.conv"
    if match := _MIDDLE_RESNET.fullmatch(name):
        return f"{match[1]}coder.mid_block.resnets.{int(match[2]) - 1}.{_resnet_layer(match[3])}"
    if match := _MIDDLE_ATTENTION.fullmatch(name):
        return f"{match[1]}coder.mid_block.attentions.0.{_ATTENTION.get(match[2], match[2])}"
    return _TOP.get(name, name)


def _stage(way: str, number: str, stages: int) -> str:
    return f"{way}_blocks.{int(number) if way == 'down' else stages - 1 - int(number)}"


def _resnet_layer(name: str) -> str:
    return "conv_shortcut" if name == "nin_shortcut" else name
