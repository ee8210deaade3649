"""`split` alone, in a loop of somebody else's: theirs is the same loop on the unsplit model."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit

from fake_tensors import make_fake
from tworeel import Pipeline, split
from tworeel.engine import infer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_plain_loop_gives_the_same_losses_and_gradients(stages, checkpointing):
    batches = [make_micro_batch("i2v-clip", torch.float64, seed) for seed in range(2)]
    losses, grads = run_unsplit(make_wan("i2v-clip", torch.float64), batches)
    model = make_wan("i2v-clip", torch.float64).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    split(model, ["cpu"] * stages)
    ours, our_grads = run_unsplit(model, batches)
    torch.testing.assert_close(ours, losses, rtol=1e-10, atol=0)
    assert_close(our_grads, grads, 1e-10)


def test_inference_works_on_a_split_model():
    batch = make_micro_batch("t2v", torch.float32, 0)
    model = make_wan("t2v", torch.float32)
    with torch.no_grad():
        expected = model(**batch).sample
        split(model, ["cpu", "cpu"])
        assert torch.equal(model(**batch).sample, expected)


def fake_wan(mode: FakeTensorMode, devices: list[str], residency: str) -> Pipeline:
    """A split toy model whose tensors are fake and lie on distinct CPU devices."""

    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with mode:  # thread-local: each carrying thread needs it
            return model(**batch)

    model = make_wan("i2v-clip", torch.float32)
    pipeline = Pipeline(model, ["cpu"] * len(devices), residency=residency, forward=forward)
    placement = pipeline.split.placement
    object.__setattr__(placement, "devices", tuple(map(torch.device, devices)))
    make_fake(model, placement.device_of, mode)
    return pipeline


@pytest.mark.parametrize("residency", ["keep", "recompute"])
def test_no_operation_mixes_devices_and_gradients_lie_where_their_weights_do(residency):
    mode = FakeTensorMode()
    pipeline = fake_wan(mode, ["cpu:1", "cpu:2", "cpu:3"], residency)
    with mode:
        batches = [
            {n: torch.empty(t.shape, dtype=t.dtype, device="cpu:1") for n, t in batch.items()}
            for batch in (make_micro_batch("i2v-clip", torch.float32, seed) for seed in range(3))
        ]
    for batch in batches:  # one at a time: a fake mode serves one thread
        result = pipeline.step([batch], lambda output, _: output.sample.square().mean())
        assert result.losses[0].device == torch.device("cpu:3")
    grads = gradients(pipeline.split.model)
    assert grads
    for name, grad in grads.items():
        assert grad.device == pipeline.split.placement.device_of(name), name


def test_what_inference_returns_is_on_the_first_device():
    mode = FakeTensorMode()
    pipeline = fake_wan(mode, ["cpu:1", "cpu:2", "cpu:3"], "keep")
    with mode:
        batch = make_micro_batch("i2v-clip", torch.float32, 0)
        output = infer(pipeline.split, **{n: torch.empty(t.shape, dtype=t.dtype) for n, t in batch.items()})
    assert output.sample.device == torch.device("cpu:1")


def test_unmoved_constants_would_be_caught():
    """The fake devices do tell: without the bridge the same model fails."""
    mode = FakeTensorMode()
    pipeline = fake_wan(mode, ["cpu:1", "cpu:2"], "keep")
    pipeline.split.remove()
    with mode:
        batch = make_micro_batch("i2v-clip", torch.float32, 0)
        batch = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu:1") for n, t in batch.items()}
        with pytest.raises(RuntimeError, match="device"):
            pipeline.split.model(**batch)
