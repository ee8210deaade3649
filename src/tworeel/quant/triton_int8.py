"""The int8 product and its scales in one Triton kernel. Imports triton, which not everyone has.

`torch._int_mm` writes int32 sums, twice the bytes of the result, which another pass has to read again; and it
refuses few rows. This kernel writes the result alone.

Shapes: M rows, K contracted, N columns.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_DEEP = 128
"""BLOCK_K of the kernel for much shared memory: where it divides K, steps over K need no mask."""
_MUCH_SHARED_MEMORY = 160 * 1024
# Triton's autotuner keeps a call's arguments in itself, and the threads of two devices launch through it.
_launching = threading.RLock()


# No annotations but `tl.constexpr`: torch.compile writes this function into a file that imports little else.
@triton.jit(do_not_specialize=["m_size"])
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    w_ptr,
    row_scales_ptr,
    scales_ptr,
    y_ptr,
    m_size,
    n_size,
    k_size,
    w_stride_k,
    w_stride_n,
    WHOLE: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    # GROUP rows of tiles are walked column by column, so that what they share stays in the L2 cache.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    tiles_n = tl.cdiv(n_size, BLOCK_N)
    group = program // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    first_m = (group * GROUP + within % height) * BLOCK_M
    first_n = (within // height) * BLOCK_N

    # Beyond the edges, the last row and the first columns are read again, and not stored. Columns wrap at a
    # multiple of 16, so 16 neighbours stay neighbours. Only offsets in a tile of q or y surely fit int32.
    m = tl.minimum(tl.arange(0, BLOCK_M), m_size - 1 - first_m)
    n = tl.max_contiguous(tl.multiple_of((first_n + tl.arange(0, BLOCK_N)) % n_size, 16), 16)
    k = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + first_m.to(tl.int64) * k_size + (m[:, None] * k_size + k[None, :])
    w_ptrs = w_ptr + (k[:, None] * w_stride_k + n[None, :] * w_stride_n)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for first_k in range(0, k_size, BLOCK_K):
        if WHOLE:
            q = tl.load(q_ptrs)
            w = tl.load(w_ptrs)
        else:
            q = tl.load(q_ptrs, mask=k[None, :] < k_size - first_k, other=0)
            w = tl.load(w_ptrs, mask=k[:, None] < k_size - first_k, other=0)
        sums = tl.dot(q, w, sums, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_stride_k

    row_scales = tl.load(row_scales_ptr + first_m + m)
    scales = tl.load(scales_ptr + n)
    y = sums.to(tl.float32) * row_scales[:, None] * scales[None, :]
    rows, columns = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + first_m.to(tl.int64) * n_size + (rows[:, None] * n_size + columns[None, :])
    inside = (rows[:, None] < m_size - first_m) & (columns[None, :] < n_size)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def _tiled(block_k: int, stages: int) -> triton.runtime.Autotuner:
    """The kernel in one tiling: tuning would compile and time several for each graph."""
    sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_k, "GROUP": 8}
    config = triton.Config(sizes, num_warps=4, num_stages=stages)
    return triton.autotune(configs=[config], key=[])(_kernel)


# On an H100 the first is the fastest of seven tilings for most products of a 14B model, the second 6 % behind
# it; that one fits the 100 KB of shared memory of consumer cards.
_TILED = {_DEEP: _tiled(_DEEP, stages=3), _DEEP // 2: _tiled(_DEEP // 2, stages=4)}


@triton_op("tworeel::int8_product", mutates_args={})
def int8_product(
    rows: Tensor, columns: Tensor, row_scales: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return y[m, n] = s[m] · s[n] · Σ q[m, k] w[k, n], shape (M, N): summed in int32, scaled in fp32.

    A row-major w takes several times as long as a column-major one.

    Args:
        rows: q, shape (M, K), int8.
        columns: w, shape (K, N), int8, row-major or column-major; K and N are multiples of 16.
        row_scales: s[m], shape (M, 1), fp32.
        scales: s[n], shape (N,), fp32.
        dtype: of the result.

    Raises:
        ValueError: w is neither row-major nor column-major, or K or N is no multiple of 16.
    """
    (m_size, k_size), n_size = rows.shape, columns.shape[1]
    if k_size % 16 or n_size % 16 or 1 not in columns.stride():
        raise ValueError(f"no int8 product with {tuple(columns.shape)} numbers at strides {columns.stride()}")
    result = rows.new_empty((m_size, n_size), dtype=dtype)

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m_size, sizes["BLOCK_M"]) * triton.cdiv(n_size, sizes["BLOCK_N"]),)

    card: Any = torch.cuda.get_device_properties(rows.device)
    depth = _DEEP if card.shared_memory_per_block_optin >= _MUCH_SHARED_MEMORY else _DEEP // 2
    with _launching, torch.cuda.device_of(rows):  # Triton launches on the current device
        wrap_triton(_TILED[depth])[grid](
            rows.contiguous(),
            columns,
            row_scales.contiguous(),
            scales.contiguous(),
            result,
            m_size,
            n_size,
            k_size,
            columns.stride(0),
            columns.stride(1),
            WHOLE=k_size % depth == 0,
        )
    return result
