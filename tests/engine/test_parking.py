"""Activations in host memory: what goes there, what stays, and that it comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline
from tworeel.engine import parking
from tworeel.engine.host_pool import HostPool
from tworeel.engine.parking import Berth, Parked
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
    berth = Berth(pool)
    small, large = torch.ones(16), torch.ones(32)
    assert isinstance(berth.park(small), Parked)
    assert berth.park(large) is large
    assert pool.held == 64


def test_small_tensors_are_not_worth_a_transfer():
    tensor = torch.ones(8)
    assert Berth(HostPool()).park(tensor) is tensor


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(24.0).view(2, 3, 4), torch.arange(24.0).view(4, 6).T, torch.arange(6, dtype=torch.int64)],
)
@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_tensor_comes_back_with_its_values_and_its_strides(tensor):
    berth = Berth(HostPool())
    parked = berth.park(tensor)
    assert isinstance(parked, Parked)
    back = berth.get(parked)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("then", [Parked.let_go, Parked.fetch, Parked.get])
def test_what_is_written_into_while_it_leaves_is_refused(monkeypatch, then):
    """Of another device the copy is made later, by a stream of its own."""
    monkeypatch.setattr(parking, "copy_out", lambda *_: object())
    monkeypatch.setattr(parking, "still_used", lambda *_: None)
    pool, tensor = HostPool(None), torch.ones(4)
    parked = Parked(tensor, pool, pool.take(tensor.nbytes, pinned=False))
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="was written into: it needs another residency"):
        then(parked)


def test_a_view_with_gaps_stays_where_it_is():
    gaps = torch.arange(24.0).view(4, 6)[:, :3]
    assert Berth(HostPool()).park(gaps) is gaps


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("residency", ["offload", "offload-selective"])
def test_the_block_before_is_fetched_while_this_one_runs(monkeypatch, residency):
    log: list[tuple[str, int]] = []
    seen: list[Berth] = []

    def logged(name: str) -> None:
        plain = getattr(Berth, name)

        def method(self: Berth, *args: Any) -> Any:
            if self in seen:
                log.append((name, seen.index(self)))
            return plain(self, *args)

        monkeypatch.setattr(Berth, name, method)

    def park(self: Berth, tensor: torch.Tensor) -> Any:
        if self not in seen:
            seen.append(self)
        return plain_park(self, tensor)

    plain_park = Berth.park
    monkeypatch.setattr(Berth, "park", park)
    logged("prefetch")
    logged("get")
    model = make_wan("t2v", torch.float32)
    Pipeline(model, ["cpu"], residency=residency).step(
        [make_micro_batch("t2v", torch.float32, 0)], square_loss
    )
    last = len(seen) - 1
    assert last >= 2
    for block in range(last, 0, -1):
        assert log.index(("prefetch", block - 1)) < log.index(("get", block)) < log.index(("get", block - 1))
    assert log.index(("get", last)) < log.index(("prefetch", 0))


@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_block_behind_one_that_parks_fetches_it(monkeypatch):
    fetched = []
    plain = Berth.prefetch
    monkeypatch.setattr(Berth, "prefetch", lambda self: fetched.append(self) or plain(self))
    model = make_wan("t2v", torch.float32)
    count = len(model.blocks)
    residencies = ["offload", *["keep"] * (count - 1)]
    batch = make_micro_batch("t2v", torch.float32, 0)
    Pipeline(model, ["cpu"], residency=residencies).step([batch], square_loss)
    assert len({id(berth) for berth in fetched}) == 1
    assert len(fetched) == 2  # by the block behind it, and by itself


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
    run_block(Scale(), (x, constant), {}, residency=Residency.OFFLOAD, berth=Berth(pool))
    assert pool.held == x.nbytes
