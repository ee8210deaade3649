"""ComfyUI's `fp8_scaled` files: 8-bit weights with a scale beside each.

    w = fp32(weight) · fp32(scale),   then rounded once to the dtype that is wanted

Two spellings exist: `<x>.scale_weight` with a marker tensor `scaled_fp8`, and the later `<x>.weight_scale`
with a JSON tensor `<x>.comfy_quant`. A weight without a scale counts as scale 1. Scales of activations
(`scale_input`, `input_scale`) only matter for 8-bit matrix products and are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tworeel.errors import raise_if_any
from tworeel.weights.tensor_files import RowRange, TensorFiles, TensorInfo

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_CPU = torch.device("cpu")
_MARKER = "scaled_fp8"
_SCALES = ("scale_weight", "weight_scale")
_IGNORED = ("scale_input", "input_scale", "comfy_quant")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class Dequantized:
    """The tensors of `files` as if they had never been quantized.

    Files without 8-bit weights pass through unchanged.

    Raises:
        UserError: a scale without its weight, a scale of a shape that fits neither the weight nor its rows,
            or a quantization other than fp8.
    """

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._scales = {
            f"{stem}.weight": name
            for name in files.names
            for stem, leaf in [_split(name)]
            if leaf in _SCALES and f"{stem}.weight" in files.names
        }
        self.names: Mapping[str, TensorInfo] = {
            name: info for name, info in files.names.items() if not _is_helper(name)
        }
        """Shape and stored dtype by name, without scales and markers."""
        problems = [*_orphans(files.names), *_misfits(files.names, self._scales), *_unknown_formats(files)]
        raise_if_any(f"{files}: {problem}" for problem in problems)

    def read(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device = _CPU,
        rows: Sequence[RowRange] | None = None,
    ) -> Tensor:
        """Read one tensor, or ranges of its rows, to a device, dequantize it there and round it to `dtype`.

        Tensors of integers and booleans keep their dtype.
        """
        tensor = self._files.read(name, device, rows)
        if not tensor.is_floating_point():
            return tensor
        if name not in self._scales:
            return tensor.to(dtype)
        one_a_row = math.prod(self._files.names[self._scales[name]].shape) > 1
        scale = self._files.read(self._scales[name], device, rows if one_a_row else None).to(torch.float32)
        shape = (-1, *[1] * (tensor.dim() - 1)) if one_a_row else ()
        return tensor.to(torch.float32).mul_(scale.reshape(shape)).to(dtype)


def _split(name: str) -> tuple[str, str]:
    stem, _, leaf = name.rpartition(".")
    return stem, leaf


def _is_helper(name: str) -> bool:
    leaf = _split(name)[1]
    return leaf == _MARKER or leaf in _SCALES or leaf in _IGNORED


def _orphans(names: Iterable[str]) -> Iterable[str]:
    known = set(names)
    for name in known:
        stem, leaf = _split(name)
        if leaf in _SCALES and f"{stem}.weight" not in known:
            yield f"'{name}': a scale without its weight '{stem}.weight'"


def _misfits(names: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> Iterable[str]:
    for weight, scale in scales.items():
        info, shape = names[weight], names[scale].shape
        size = torch.Size(shape).numel()
        if info.dtype not in FP8_DTYPES:
            yield f"'{weight}': has a scale but is {info.dtype}; only fp8 weights are supported"
        elif size != 1 and shape not in ((info.shape[0],), (info.shape[0], *[1] * (len(info.shape) - 1))):
            yield f"'{scale}': shape {shape} is neither one scale nor one a row of '{weight}' {info.shape}"
        elif names[scale].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            yield f"'{scale}': {names[scale].dtype} scales are not supported"


def _unknown_formats(files: TensorFiles) -> Iterable[str]:
    for name in files.names:
        if _split(name)[1] == "comfy_quant":
            quantization = _format(files.read(name))
            if quantization not in _FORMATS:
                yield f"'{name}': format '{quantization}' is not supported; known are {', '.join(_FORMATS)}"


def _format(tensor: Tensor) -> object:
    """Return the `format` of a JSON text that is kept as a tensor of bytes."""
    try:
        value = json.loads(bytes(tensor.to(torch.uint8).tolist()))
    except ValueError:
        return None
    return value.get("format") if isinstance(value, dict) else None
