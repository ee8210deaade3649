"""On real devices split equals unsplit: ours is `Pipeline.step`, theirs the whole model on one GPU."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, tiny_model
from torch import Tensor, nn
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.demo.clips import write_clips
from tworeel.training.assembly import load_model
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun

pytestmark = pytest.mark.gpu

MIB = 2**20


def on(device: torch.device | str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors on one device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def relative(devices: list[torch.device]) -> float:
    """What both sides may differ by: Wan's norms and modulation are fp32, which a CPU rounds otherwise."""
    return 1e-9 if len({device.type for device in devices}) == 1 else 1e-5


@pytest.mark.parametrize("residency", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("kind", ["t2v", "i2v-clip", "ti2v"])
def test_split_on_devices_equals_unsplit_on_one(
    gpu: torch.device, devices: list[torch.device], kind: str, residency: str
) -> None:
    batches = [make_micro_batch(kind, torch.float64, seed) for seed in range(4)]
    losses, expected = run_unsplit(make_wan(kind, torch.float64).to(gpu), [on(gpu, b) for b in batches])
    model = make_wan(kind, torch.float64)
    result = Pipeline(model, devices, residency=residency).step(batches, square_loss)
    assert all(loss.device == devices[-1] for loss in result.losses)
    ours, theirs = ([loss.cpu() for loss in found] for found in (result.losses, losses))
    torch.testing.assert_close(ours, theirs, rtol=relative(devices), atol=0)
    assert_close(on("cpu", gradients(model)), on("cpu", expected), relative(devices))


def test_a_plain_training_loop_goes_on_over_the_devices(
    gpu: torch.device, devices: list[torch.device]
) -> None:
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(2)]
    _, expected = run_unsplit(make_wan("t2v", torch.float64).to(gpu), [on(gpu, b) for b in batches])
    model = make_wan("t2v", torch.float64)
    split(model, devices, residency="recompute")
    run_unsplit(model, batches)
    assert_close(on("cpu", gradients(model)), on("cpu", expected), relative(devices))


def test_weights_and_gradients_are_on_the_device_of_their_stage(devices: list[torch.device]) -> None:
    model = make_wan("t2v", torch.float32)
    pipeline = Pipeline(model, devices)
    pipeline.step([make_micro_batch("t2v", torch.float32, seed) for seed in range(3)], square_loss)
    place = pipeline.split.placement.device_of
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {place(name) for name in tensors} == set(devices)
    assert [name for name, tensor in tensors.items() if tensor.device != place(name)] == []
    assert [name for name, grad in gradients(model).items() if grad.device != place(name)] == []


def test_a_loaded_model_leaves_nothing_on_the_other_device(
    devices: list[torch.device], tmp_path: Path
) -> None:
    model_config = tiny_model(tmp_path / "model", dim=512, ffn_dim=1024)
    write_clips(tmp_path / "clips", count=1)
    engine = {"devices": tuple(map(str, devices))}
    config = tiny_config(model_config, tmp_path / "clips", tmp_path / "run", engine=engine)
    job = preflight(config, SilentRun())
    gpus = {device for device in devices if device.type != "cpu"}
    gc.collect()
    before = {device: torch.accelerator.memory_allocated(device) for device in gpus}
    model = load_model(config, job)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [n for n, tensor in tensors.items() if tensor.device != job.placement.device_of(n)] == []
    gc.collect()
    for device in gpus:
        own = [tensor.nbytes for tensor in tensors.values() if tensor.device == device]
        # CUDA's allocator rounds small tensors up to 512 bytes and may add a MiB to large ones.
        rounding = sum(512 if size <= MIB else MIB for size in own)
        grown = torch.accelerator.memory_allocated(device) - before[device]
        assert sum(own) <= grown <= sum(own) + rounding


def test_the_error_of_one_stage_ends_the_step(devices: list[torch.device]) -> None:
    def failing(model: nn.Module, numbered: tuple[int, dict[str, Tensor]]) -> Tensor:
        output: Tensor = model(**numbered[1]).sample
        if numbered[0] == 2:
            raise ArithmeticError("broken")
        return output

    pipeline = Pipeline(make_wan("t2v", torch.float32), devices, forward=failing)
    batches = [(n, make_micro_batch("t2v", torch.float32, n)) for n in range(5)]
    with pytest.raises(ArithmeticError, match="broken"):
        pipeline.step(batches, lambda output, _: output.square().mean())
    pipeline.step(batches[:2], lambda output, _: output.square().mean())
