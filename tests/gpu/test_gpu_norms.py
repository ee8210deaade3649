"""Compiled blocks against the same blocks uncompiled, at real widths."""

from __future__ import annotations

import pytest
import torch

from tworeel.benchmarks import models
from tworeel.benchmarks.preparing import Gradients, Prepared, Settings, gradients_of, prepare
from tworeel.benchmarks.results import agreement_of
from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.engine import split
from tworeel.engine.attention import attention_backend


def gradients(prepared: Prepared, device: torch.device, *, compile: bool, residency: str) -> Gradients:
    prepared.model.zero_grad()
    division = split(
        prepared.model, [device], blocks=prepared.family.block_lists, residency=residency, compile=compile
    )
    with attention_backend("deterministic", [device]):
        models.mean_square(prepared.model(**prepared.batches[0])).backward()
    assert division.compiler is None or not division.compiler.failed
    division.remove()
    return gradients_of(prepared.model)


@pytest.mark.parametrize("residency", ["keep", "selective"])
@pytest.mark.parametrize(
    ("model", "shape", "to_the_bit"),
    [
        ("flux2-klein-4b", "512x512", True),
        ("wan-1.3b", "832x480x17", False),  # but for the backward of its GELU
    ],
)
def test_each_gradient_of_compiled_blocks_is_that_of_blocks_that_are_not(
    gpu: torch.device, model: str, shape: str, to_the_bit: bool, residency: str
) -> None:
    (case,) = make_cases(model_shape(model), shapes=(shape,), micro_batches=[1])
    prepared = prepare(case, Settings(devices=(gpu,)), 4)
    found, expected = (gradients(prepared, gpu, compile=way, residency=residency) for way in (True, False))
    assert agreement_of(found, expected).worst_cosine >= 0.9999
    assert not to_the_bit or all(torch.equal(found[name], expected[name]) for name in expected)
