"""The int8 kernel of ours gives the numbers of torch's int8 product and the scales after it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.residency import plain_call
from tworeel.quant import quantize_blocks
from tworeel.quant.matmul import matmul_mode, scaled_matmul
from tworeel.quant.rows import quantize_weight

pytestmark = pytest.mark.gpu

SHAPES = [(5120, 1536), (1552, 272)]
"""Of (K, N); those of the second are multiples of 16 but not of any tile."""


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # need not be the current one
    if matmul_mode(device, torch.int8) != "fused":
        pytest.skip("needs compute capability 8.0 and Triton")
    return device


def operands(device, m, k, n, dtype):
    weight, scales = quantize_weight(torch.randn(n, k, device=device) / k**0.5, torch.int8)
    return torch.randn(m, k, device=device).to(dtype), weight.t(), scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("m", [1, 17, 1024, 20280])
def test_fused_is_the_product_and_its_scales(cuda, m, k, n, row_major, dtype):
    rows, columns, scales = operands(cuda, m, k, n, dtype)
    expected = scaled_matmul(rows, columns, scales, "tensorwise")
    ours = scaled_matmul(rows, columns.contiguous() if row_major else columns, scales, "fused")
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_compiled_the_kernel_gives_the_same_for_any_number_of_rows(cuda, k, n, row_major):
    from tworeel.quant.triton_int8 import int8_product

    def product(*operands):
        return int8_product(*operands, torch.bfloat16)

    torch.compiler.reset()
    compiled = torch.compile(product, fullgraph=True, dynamic=True)
    weight = torch.randint(-127, 128, (n, k), device=cuda, dtype=torch.int8)
    columns, scales = weight.t(), torch.rand(n, device=cuda)
    if row_major:
        columns = columns.contiguous()
    for m in (17, 1024, 20280):
        rows = torch.randint(-127, 128, (m, k), device=cuda, dtype=torch.int8)
        row_scales = torch.rand(m, 1, device=cuda)
        given = (rows, columns, row_scales, scales)
        assert torch.equal(compiled(*given), product(*given))


@pytest.mark.parametrize("way", ["eager", "compiled", "cpp"])
@pytest.mark.parametrize("m", [1, 17, 1024, 20280])
def test_a_layers_output_and_gradient_are_those_of_the_unfused_product(monkeypatch, caplog, cuda, m, way):
    model = nn.Sequential(nn.Linear(1536, 1040)).to(cuda, torch.bfloat16)
    quantize_blocks(model, "int8", ["0"])
    x = torch.randn(m, 1536, device=cuda, dtype=torch.bfloat16)
    direction = torch.randn(m, 1040, device=cuda, dtype=torch.bfloat16)

    def run(function):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        output.backward(direction)
        return output.detach().float(), leaf.grad.float()

    with monkeypatch.context() as patch:
        patch.setattr("tworeel.quant.scaled.matmul_mode", lambda device, dtype: "tensorwise")
        theirs = run(
            model
        )  # first: what is launched from C++ needs a context, which autograd's thread now has
    torch.compiler.reset()
    is_eager = way == "eager"
    compiler = BlockCompiler(cpp_wrapper=way == "cpp")
    ours = run(model if is_eager else partial(compiler, plain_call(type(model)), model))
    assert not compiler.failed and "C++ wrapper" not in caplog.text
    for tensor, expected in zip(ours, theirs, strict=True):
        # Fused kernels round less often, and a rounding to 8 bits may then fall to the other side.
        tolerance = 0.0 if is_eager else 0.03 * expected.norm()
        assert (tensor - expected).norm() <= tolerance
