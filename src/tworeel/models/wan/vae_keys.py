"""Names in the VAE files of Wan's authors, and the same modules in diffusers' `AutoencoderKLWan`.

Both Wan VAEs have four stages with two residual blocks each (three in the decoder) and a resampling layer
between stages. Wan 2.1 counts the layers of all stages through; Wan 2.2 (`residual`) nests them by stage.
"""

from __future__ import annotations

from collections.abc import Iterator

STAGES = 4
_ENCODER_BLOCKS = 2
_DECODER_BLOCKS = 3

_RESIDUAL_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLER = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_MIDDLE = (
    ("middle.0", "mid_block.resnets.0", _RESIDUAL_BLOCK),
    ("middle.1", "mid_block.attentions.0", _ATTENTION),
    ("middle.2", "mid_block.resnets.1", _RESIDUAL_BLOCK),
)


def vae_modules(residual: bool) -> dict[str, str]:
    """Map every module that may hold weights from the authors' name to diffusers' name.

    Args:
        residual: True for the Wan 2.2 VAE, False for the Wan 2.1 VAE.
    """
    modules = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        groups = [("", "", _ENDS), *_MIDDLE, *_stage_layers(half, residual)]
        for native, diffusers, parts in groups:
            for theirs, ours in parts.items():
                modules[_join(half, native, theirs)] = _join(half, diffusers, ours)
    return modules


def _stage_layers(half: str, residual: bool) -> Iterator[tuple[str, str, dict[str, str]]]:
    blocks = _ENCODER_BLOCKS if half == "encoder" else _DECODER_BLOCKS
    for stage in range(STAGES):
        for layer in range(blocks + (stage < STAGES - 1)):
            resampler = layer == blocks
            native = _native_layer(half, residual, stage, layer, stage * (blocks + 1) + layer)
            diffusers = _diffusers_layer(half, residual, stage, layer, resampler)
            yield native, diffusers, _RESAMPLER if resampler else _RESIDUAL_BLOCK


def _native_layer(half: str, residual: bool, stage: int, layer: int, index: int) -> str:
    layers = "downsamples" if half == "encoder" else "upsamples"
    return f"{layers}.{stage}.{layers}.{layer}" if residual else f"{layers}.{index}"


def _diffusers_layer(half: str, residual: bool, stage: int, layer: int, resampler: bool) -> str:
    if half == "encoder" and not residual:
        return f"down_blocks.{stage * (_ENCODER_BLOCKS + 1) + layer}"
    direction = "down" if half == "encoder" else "up"
    single = f"{direction}sampler" if residual else f"{direction}samplers.0"
    return f"{direction}_blocks.{stage}." + (single if resampler else f"resnets.{layer}")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
