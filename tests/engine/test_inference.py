"""Forwards between the steps of a training, which leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from toy_wan import make_micro_batch, make_wan, square_loss

from tworeel.engine import Pipeline, at_rest, infer, random_state_kept, split


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("residency", ["keep", "offload"])
def test_it_gives_the_unsplit_models_output_without_a_graph(stages, residency):
    batch = make_micro_batch("i2v-clip", torch.float32, 1)
    model = make_wan("i2v-clip", torch.float32)
    with torch.no_grad():
        expected = model(**batch).sample
    streamed = [1] * stages if residency == "offload" else None
    division = split(model, ["cpu"] * stages, residency=residency, streamed=streamed)
    with at_rest(division):
        for _ in range(2):
            found = infer(division, **batch).sample
            assert torch.equal(found, expected) and not found.requires_grad


def test_steps_before_and_after_it_have_the_same_bits():
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(3)]
    gradients = []
    for looks in (False, True):
        model = make_wan("t2v", torch.float32).train()
        division = split(model, ["cpu", "cpu"], residency="recompute", streamed=[1, 1])
        pipeline = Pipeline(division)
        pipeline.step(batches, square_loss)
        if looks:
            with at_rest(division):
                assert not model.training
                infer(division, **make_micro_batch("t2v", torch.float32, 8))
            assert all(module.training for module in model.modules())
        pipeline.step(batches, square_loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_the_model_is_restored_after_an_error():
    division = split(make_wan("t2v", torch.float32).train(), ["cpu", "cpu"], compile=True)
    compiler = division.compiler
    with pytest.raises(TypeError), at_rest(division):
        infer(division, division.compiler)
    assert division.compiler is compiler is not None
    assert division.model.training


def test_random_numbers_that_are_drawn_inside_are_not_missed():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with random_state_kept([torch.device("cpu")]):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)
