"""Products in 8 bits, in every way that a device may do them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch

from tworeel.quant.matmul import _triton_starts, assumed_mode, matmul_mode, scaled_matmul, triton_works
from tworeel.quant.rows import quantize_rows, quantize_weight

FP8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    """Triton is looked for anew in the test, and after it."""
    _triton_starts.cache_clear()
    yield
    _triton_starts.cache_clear()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 17, 50])
@pytest.mark.parametrize(("dtype", "mode"), [(FP8, "rowwise"), (FP8, "tensorwise"), (INT8, "tensorwise")])
def test_the_product_is_that_of_the_quantized_matrices(dtype, source, rows, mode):
    x, weight = torch.randn(rows, 64).to(source), torch.randn(48, 64)
    quantized, scales = quantize_weight(weight, dtype)
    product = scaled_matmul(x, quantized.t(), scales, mode)

    x_quantized, x_scales = quantize_rows(x, dtype)
    exact = (x_quantized.double() * x_scales) @ (quantized.double() * scales[:, None]).t()
    assert product.dtype == source
    rounding = 2**-7 if source == torch.bfloat16 else 1e-5
    torch.testing.assert_close(product.double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("capability", "platform", "fp8", "int8"),
    [
        ((7, 0), "linux", "weight-only", "weight-only"),
        ((8, 6), "linux", "weight-only", "tensorwise"),
        ((8, 9), "linux", "tensorwise", "tensorwise"),
        ((9, 0), "linux", "rowwise", "tensorwise"),
        ((9, 0), "win32", "tensorwise", "tensorwise"),
        ((12, 0), "linux", "tensorwise", "tensorwise"),
    ],
)
def test_the_capability_of_a_gpu_decides(monkeypatch, capability, platform, fp8, int8):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("tworeel.quant.matmul.triton_works", lambda: False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    assert (matmul_mode(device, FP8), matmul_mode(device, INT8)) == (fp8, int8)


@pytest.mark.parametrize(
    ("capability", "int8"), [((7, 5), "tensorwise"), ((8, 0), "fused"), ((8, 9), "fused"), ((12, 0), "fused")]
)
def test_int8_is_fused_with_its_scales_where_triton_works(monkeypatch, capability, int8):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("tworeel.quant.matmul.triton_works", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    assert (matmul_mode(device, INT8), matmul_mode(device, FP8) == "fused") == (int8, False)
    assert matmul_mode(torch.device("cpu"), INT8) == "tensorwise"


class _Driver:
    """Triton's, on a machine where it does not start."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def active(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    "runtime",
    [
        None,  # not installed
        SimpleNamespace(driver=_Driver(RuntimeError("Failed to find C compiler"))),
        SimpleNamespace(driver=_Driver(CalledProcessError(1, "gcc"))),
    ],
    ids=["missing", "no compiler", "no headers"],
)
def test_without_a_triton_that_starts_int8_is_not_fused(monkeypatch, fresh_probe, runtime):
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    if runtime is not None:
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(runtime=runtime))
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert matmul_mode(torch.device("cuda", 0), INT8) == "tensorwise"


def test_whether_triton_works_is_a_constant_of_a_compiled_graph(monkeypatch, fresh_probe):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1 if triton_works() else x - 1, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == -1


def test_rocm_and_other_accelerators_only_keep_their_weights_in_8_bits(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert matmul_mode(torch.device("cuda", 0), FP8) == "weight-only"
    assert matmul_mode(torch.device("xpu", 0), INT8) == "weight-only"


def test_a_mode_can_be_assumed_for_what_is_traced() -> None:
    with assumed_mode("rowwise"):
        assert matmul_mode(torch.device("cpu"), FP8) == "rowwise"
    assert matmul_mode(torch.device("cpu"), FP8) == "tensorwise"
