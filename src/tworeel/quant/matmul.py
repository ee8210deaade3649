"""Products of 8-bit matrices, by what a device can do.

Shapes: M rows, K contracted, N columns.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tworeel.quant.rows import quantize_rows

Mode = Literal["rowwise", "fused", "tensorwise", "weight-only"]
"""What is done in 8 bits: the product with both scales (by torch for fp8, by a kernel of ours for int8), the
product, or only the keeping."""

ALIGNMENT = 16
"""Both dimensions of an 8-bit weight must be multiples of this to be multiplied as they are."""
_FEWEST_INT8_ROWS = 32


_assumed: Mode | None = None


@contextmanager
def assumed_mode(mode: Mode) -> Iterator[None]:
    """Let every device multiply so, inside: what a card would do is traced without the card."""
    global _assumed
    before, _assumed = _assumed, mode
    try:
        yield
    finally:
        _assumed = before


def matmul_mode(device: torch.device, dtype: torch.dtype) -> Mode:
    """Say how `device` multiplies by a weight of this 8-bit dtype.

    fp8 products came with compute capability 8.9, int8 products with 7.5. Row scales inside the fp8 product
    are used where torch's own builds have fast kernels for them: 9.x and 10.x, not on Windows. ROCm and
    other accelerators only keep their weights in 8 bits. The int8 kernel of ours is for Triton's devices, 8.0
    and above, where Triton is installed.
    """
    if _assumed is not None:
        return _assumed
    if device.type == "cpu":
        return "tensorwise"
    if device.type != "cuda" or torch.version.hip is not None:
        return "weight-only"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if dtype == torch.int8:
        if capability >= (8, 0) and triton_works():
            return "fused"
        return "tensorwise" if capability >= (7, 5) else "weight-only"
    if properties.major in (9, 10) and sys.platform != "win32":
        return "rowwise"
    return "tensorwise" if capability >= (8, 9) else "weight-only"


@torch.compiler.assume_constant_result
def triton_works() -> bool:
    """Say whether Triton is here, and what it needs to launch kernels: a C compiler and Python's headers."""
    return _triton_starts()


def scaled_matmul(rows: Tensor, columns: Tensor, scales: Tensor, mode: Mode) -> Tensor:
    """Quantize the rows, then multiply: y[m, n] = s[m] · s[n] · Σ q[m, k] w[k, n], shape (M, N).

    Args:
        rows: shape (M, K), bf16, fp16 or fp32; the result has this dtype.
        columns: w, shape (K, N), fp8 or int8, column-major: what NVIDIA's 8-bit kernels take. "fused" takes a
            row-major one too.
        scales: s[n], shape (N,), fp32.
        mode: any but "weight-only", as `matmul_mode` says.
    """
    quantized, row_scales = quantize_rows(rows, columns.dtype)
    if mode == "rowwise" and rows.dtype == torch.bfloat16:  # the kernels write no other dtype
        return _fp8_product(quantized, columns, row_scales, scales[None], torch.bfloat16)
    if mode == "fused":
        if _assumed is not None:
            return _traced_int8_product(quantized, columns, row_scales, scales, rows.dtype)
        from tworeel.quant.triton_int8 import int8_product

        return int8_product(quantized, columns, row_scales, scales, rows.dtype)
    if columns.dtype == torch.int8:
        product = _int8_product(quantized, columns)
    else:
        one = torch.ones((), device=rows.device)
        # Unscaled sums can be too large for fp16.
        wide = rows.dtype if rows.dtype == torch.bfloat16 else torch.float32
        product = _fp8_product(quantized, columns, one, one, wide)
    return (product * row_scales).mul_(scales).to(rows.dtype)


@functools.cache
def _triton_starts() -> bool:
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # builds the launcher's C code, or finds it built
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        return False
    return True


def _fp8_product(
    rows: Tensor, columns: Tensor, row_scales: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    # The shorter accumulator of use_fast_accum errs far less than rounding to e4m3 does.
    return torch._scaled_mm(rows, columns, row_scales, scales, out_dtype=dtype, use_fast_accum=True)


def _traced_int8_product(
    rows: Tensor, columns: Tensor, row_scales: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """What needs no Triton and has the tensors of the kernel that does: fp8's product with both scales."""
    fp8 = torch.float8_e4m3fn
    return _fp8_product(rows.view(fp8), columns.view(fp8), row_scales, scales[None], dtype)


def _int8_product(rows: Tensor, columns: Tensor) -> Tensor:
    """Sums in int32; CUDA wants more than 16 rows."""
    missing = _FEWEST_INT8_ROWS - rows.shape[0]
    if missing <= 0:
        return torch._int_mm(rows, columns)
    return torch._int_mm(functional.pad(rows, (0, 0, 0, missing)), columns)[: rows.shape[0]]
