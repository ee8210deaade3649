"""Activations in host memory: what goes there, what stays, and that it comes back as it was."""

from __future__ import annotations

import pytest
import torch
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline
from tworeel.engine import parking
from tworeel.engine.parking import Berth, HostPool, Parked
from tworeel.engine.residency import Residency, run_block


@pytest.fixture
def everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy tensors are far below the size from which a transfer pays."""
    monkeypatch.setattr(parking, "SMALLEST", 0)


@pytest.mark.parametrize("residency", ["offload", "offload-selective"])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.usefixtures("everything_is_worth_it")
def test_parked_activations_give_the_gradients_of_the_unsplit_model(residency, stages):
    batches = [make_micro_batch("i2v-clip", torch.float64, seed) for seed in range(3)]
    losses, expected = run_unsplit(make_wan("i2v-clip", torch.float64), batches)
    model = make_wan("i2v-clip", torch.float64)
    pipeline = Pipeline(model, ["cpu"] * stages, residency=residency, slack=1)
    for _ in range(2):
        model.zero_grad()
        result = pipeline.step(batches, square_loss)
        torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
        assert_close(gradients(model), expected, 1e-10)
    assert pipeline.split.host_pool.held > 0


@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_second_step_takes_no_more_host_memory_than_the_first():
    batches = [make_micro_batch("t2v", torch.float32, 0)] * 4  # of one shape
    pipeline = Pipeline(make_wan("t2v", torch.float32), ["cpu", "cpu"], residency="offload-selective")
    pipeline.step(batches[:1], square_loss)
    one = pipeline.split.host_pool.held
    pipeline.step(batches[:1], square_loss)
    assert pipeline.split.host_pool.held == one
    pipeline.step(batches, square_loss)
    # 1F1B: two micro-batches are in flight on the first stage, one on the second.
    assert one < pipeline.split.host_pool.held <= 2 * one


def test_what_does_not_fit_in_the_limit_stays_on_the_device(monkeypatch):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    pool = HostPool(limit=100)
    berth = Berth(pool, None)
    small, large = torch.ones(16), torch.ones(32)
    assert isinstance(berth.park(small), Parked)
    assert berth.park(large) is large
    assert pool.held == 64


def test_small_tensors_are_not_worth_a_transfer():
    tensor = torch.ones(8)
    assert Berth(HostPool(), None).park(tensor) is tensor


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(24.0).view(2, 3, 4), torch.arange(24.0).view(4, 6).T, torch.arange(6, dtype=torch.int64)],
)
@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_tensor_comes_back_with_its_values_and_its_strides(tensor):
    berth = Berth(HostPool(), None)
    parked = berth.park(tensor)
    assert isinstance(parked, Parked)
    back = berth.get(parked)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype


@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_view_with_gaps_stays_where_it_is():
    gaps = torch.arange(24.0).view(4, 6)[:, :3]
    assert Berth(HostPool(), None).park(gaps) is gaps


@pytest.mark.usefixtures("everything_is_worth_it")
def test_the_block_before_is_fetched_while_this_one_runs():
    pool = HostPool()
    first = Berth(pool, None)
    second = Berth(pool, first)
    early, late = first.park(torch.ones(4)), second.park(torch.ones(4))
    second.get(late)
    assert early._fetched is not None


@pytest.mark.usefixtures("everything_is_worth_it")
def test_weights_and_shared_constants_are_never_parked():
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))

        def forward(self, h: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
            return h * self.weight * constant

    pool, constant = HostPool(), torch.randn(64)
    x = torch.randn(64, requires_grad=True)
    run_block(Scale(), (x, constant), {}, residency=Residency.OFFLOAD, berth=Berth(pool, None))
    assert pool.held == x.nbytes
