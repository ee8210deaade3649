"""Where a block's input waits for its backward."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, square_loss

from tworeel import Pipeline
from tworeel.engine.host_pool import HostPool
from tworeel.engine.parking import Berth, Departures
from tworeel.engine.residency import Residency, run_block

pytestmark = pytest.mark.gpu

ROWS = 4099
"""A number that no other tensor's shape begins with."""
WIDTH = 2048


def host_copies() -> list[Tensor]:
    """Tensors of the inputs' shape that are in host memory."""
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is Tensor and thing.device.type == "cpu" and thing.shape == (ROWS, WIDTH)
    ]


def run_blocks(device: torch.device, residency: Residency, count: int) -> tuple[Tensor, Tensor, int]:
    """Run linear layers one after the other; return the input, the output, and the bytes that were added."""
    torch.manual_seed(0)
    blocks = [nn.Linear(WIDTH, WIDTH).to(device) for _ in range(count)]
    x = torch.randn(ROWS, WIDTH).to(device).requires_grad_()
    before = torch.accelerator.memory_allocated(device)
    hidden: Tensor = x
    departures = Departures()
    for block in blocks:
        berth = Berth(HostPool())
        hidden = run_block(block, (hidden,), {}, residency=residency, berth=berth)
        departures.begin(device, berth)
    departures.settle(device)
    return x, hidden, torch.accelerator.memory_allocated(device) - before


def test_offload_keeps_each_input_in_pinned_memory_until_its_backward(cuda: torch.device) -> None:
    assert not host_copies()
    _, output, _ = run_blocks(cuda, Residency.OFFLOAD, 3)
    held = host_copies()
    assert len(held) == 3
    assert all(tensor.is_pinned() for tensor in held)
    del held
    output.sum().backward()
    del output
    gc.collect()
    assert not host_copies()


def test_offload_frees_the_device_between_forward_and_backward(gpu: torch.device) -> None:
    size = ROWS * WIDTH * 4
    grown = {}
    for residency in (Residency.RECOMPUTE, Residency.OFFLOAD):
        x, output, grown[residency] = run_blocks(gpu, residency, 4)
        del x, output
        gc.collect()
    # Four blocks hold four inputs; the first is the caller's own, and the output stays in both cases.
    assert grown[Residency.RECOMPUTE] - grown[Residency.OFFLOAD] >= 3 * size


def test_the_input_comes_back_as_it_was(gpu: torch.device) -> None:
    found = []
    for residency in (Residency.KEEP, Residency.OFFLOAD):
        x, output, _ = run_blocks(gpu, residency, 3)
        output.square().sum().backward()
        assert x.grad is not None
        found.append(x.grad.cpu())
    assert torch.equal(*found)


def test_what_is_parked_by_many_blocks_takes_no_more_of_the_device_however_far_the_host_runs_ahead(
    cuda: torch.device,
) -> None:
    class Chain(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

        def forward(self, hidden: Tensor) -> Tensor:
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    taken = {}
    for count in (4, 12):
        pipeline = Pipeline(Chain(count), [cuda], residency="offload")
        batches = [torch.randn(ROWS, WIDTH).to(cuda) for _ in range(2)]
        for _ in range(2):  # pinned memory is made in the first, which waits for the device
            torch.accelerator.synchronize()
            torch.accelerator.reset_peak_memory_stats(cuda)
            before = torch.accelerator.memory_allocated(cuda)
            torch.cuda._sleep(1_000_000_000)
            pipeline.step(batches, lambda output, _: output.square().mean())
        torch.accelerator.synchronize()
        taken[count] = torch.accelerator.max_memory_allocated(cuda) - before
    assert taken[12] <= taken[4] + 2**20


def test_a_forward_without_a_backward_leaves_what_it_parked_alone(cuda: torch.device) -> None:
    taken = []
    for _ in range(2):  # the first makes workspaces, which stay
        found = run_blocks(cuda, Residency.OFFLOAD, 3)
        del found
        gc.collect()
        torch.accelerator.synchronize()
        torch.randn(1, device=cuda)
        taken.append(torch.accelerator.memory_allocated(cuda))
    assert taken[0] == taken[1]


@pytest.mark.parametrize("residency", ["selective", "recompute", "offload", "offload-selective"])
def test_gradients_are_those_of_kept_activations(devices: list[torch.device], residency: str) -> None:
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(4)]
    found = {}
    for name in ("keep", residency):
        model = make_wan("t2v", torch.float32)
        Pipeline(model, devices, residency=name).step(batches, square_loss)
        found[name] = {key: grad.cpu() for key, grad in gradients(model).items()}
    assert_close(found[residency], found["keep"], 1e-5)


def test_pinned_memory_stays_within_its_limit_when_sizes_change(cuda: torch.device) -> None:
    """PyTorch keeps pinned memory that is given up, for tensors of the same size."""
    stats = torch.cuda.host_memory_stats
    torch.accelerator.synchronize(cuda)
    before = stats()["allocated_bytes.current"]
    pool = HostPool(limit=2**24)
    for size in (2**18, 2**20, 2**22):  # each filling the pool
        tensors = [torch.full((size // 4,), float(i), device=cuda) for i in range(2**24 // size)]
        berth = Berth(pool)
        parked = [berth.park(tensor) for tensor in tensors]
        assert not any(isinstance(one, Tensor) for one in parked)
        berth.let_go()
        for one, tensor in zip(parked, tensors, strict=True):
            assert torch.equal(berth.get(one), tensor)
        assert pool.held == 2**24
        # But for a few bytes, of whoever else pins some; or gives up much, if its threads end meanwhile
        assert stats()["allocated_bytes.current"] - before - pool.held < 2**12
