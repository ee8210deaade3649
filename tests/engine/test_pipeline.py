"""Split equals unsplit: ours is `Pipeline.step`, theirs diffusers' forward and one backward a micro-batch."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import time
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import nn
from toy_wan import KINDS, assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine import pipeline as pipeline_module
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import make_orders, most_in_flight
from tworeel.engine.timeline import busy_shares

EVERYWHERE = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "net.0.proj",
    "net.2",
    "linear_1",
    "linear_2",
    "time_proj",
    "proj_out",
]


COUNTS = (1, 2, 3, 8)
"""Micro-batches of a step: fewer than stages, as many, and more."""
STAGES = (1, 2, 4)
DTYPES = (torch.float64, torch.float32)
CASES = [
    (kind, DTYPES[(i + 3 * j) % 5 % 2], STAGES[(i + j) % 3], residency)
    for i, kind in enumerate(KINDS)
    for j, residency in enumerate(Residency)
]
"""Each value of each of the four meets each value of the others; all 150 combinations showed nothing more."""


def test_each_pair_of_what_differs_is_a_case():
    for first, second in itertools.combinations(range(4), 2):
        met = {(case[first], case[second]) for case in CASES}
        assert len(met) == len({case[first] for case in CASES}) * len({case[second] for case in CASES})


@functools.cache
def reference(kind: str, dtype: torch.dtype) -> dict[int, tuple[list, list, dict]]:
    """Micro-batches, losses and gradients of the unsplit model, by the number of micro-batches."""
    found, model = {}, make_wan(kind, dtype)
    batches = [make_micro_batch(kind, dtype, seed) for seed in range(max(COUNTS))]
    for count in COUNTS:
        model.zero_grad()
        losses, grads = run_unsplit(model, batches[:count])
        found[count] = batches[:count], losses, {n: g.clone() for n, g in grads.items()}
    return found


@pytest.mark.parametrize(("kind", "dtype", "stages", "residency"), CASES)
def test_split_equals_unsplit(kind, dtype, stages, residency):
    relative = 1e-10 if dtype is torch.float64 else 1e-5
    model = make_wan(kind, dtype)
    pipeline = Pipeline(model, ["cpu"] * stages, residency=residency)
    for batches, losses, grads in reference(kind, dtype).values():
        model.zero_grad()
        result = pipeline.step(batches, square_loss)
        torch.testing.assert_close(list(result.losses), losses, rtol=relative, atol=0)
        assert_close(gradients(model), grads, relative)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("kind", ["i2v-clip", "ti2v"])
def test_trainable_embedders_and_head_get_the_gradient_of_all_stages(kind, stages):
    batches = [make_micro_batch(kind, torch.float64, seed) for seed in range(3)]
    theirs = make_wan(kind, torch.float64, targets=EVERYWHERE)
    losses, grads = run_unsplit(theirs, batches)
    assert any("time_embedder" in name for name in grads)
    model = make_wan(kind, torch.float64, targets=EVERYWHERE)
    result = Pipeline(model, ["cpu"] * stages, residency="recompute").step(batches, square_loss)
    torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
    assert_close(gradients(model), grads, 1e-10)


def test_all_weights_can_be_trained():
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(3)]
    theirs = make_wan("t2v", torch.float64).requires_grad_(True)
    _, grads = run_unsplit(theirs, batches)
    model = make_wan("t2v", torch.float64).requires_grad_(True)
    Pipeline(model, ["cpu"] * 3).step(batches, square_loss)
    assert_close(gradients(model), grads, 1e-10)


@pytest.mark.parametrize("at", [[1], [2], [4], [1, 2, 3]])
def test_flux2_crosses_inside_and_between_its_two_kinds_of_blocks(at):
    def make() -> Flux2Transformer2DModel:
        torch.manual_seed(0)
        return Flux2Transformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=4,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=12,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
        ).double()

    def batch(seed: int) -> dict:
        torch.manual_seed(seed)
        return {
            "hidden_states": torch.randn(1, 6, 8).double(),
            "encoder_hidden_states": torch.randn(1, 5, 12).double(),
            "timestep": torch.rand(1).double(),
            "guidance": torch.ones(1).double(),
            "img_ids": torch.randint(0, 4, (1, 6, 4)),
            "txt_ids": torch.randint(0, 4, (1, 5, 4)),
        }

    batches = [batch(seed) for seed in range(3)]
    losses, grads = run_unsplit(theirs := make(), batches)
    assert len(grads) == len(list(theirs.parameters()))
    model = make()
    result = Pipeline(model, ["cpu"] * (len(at) + 1), at=at, residency="recompute").step(batches, square_loss)
    torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
    assert_close(gradients(model), grads, 1e-10)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_model_that_checkpoints_its_blocks_itself_gets_the_same_gradients(stages):
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(3)]
    _, grads = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    model.enable_gradient_checkpointing()
    model.train()
    Pipeline(model, ["cpu"] * stages).step(batches, square_loss)
    assert_close(gradients(model), grads, 1e-10)


def test_two_steps_of_the_same_inputs_give_the_same_bits():
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(6)]
    results = []
    for _ in range(3):
        model = make_wan("t2v", torch.float32)
        losses = (
            Pipeline(model, ["cpu"] * 3, residency="recompute", slack=1).step(batches, square_loss).losses
        )
        results.append((losses, gradients(model)))
    for losses, grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses, results[0][0], strict=True))
        assert all(torch.equal(grads[n], results[0][1][n]) for n in grads)


def test_gradients_add_to_those_that_are_there():
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(2)]
    _, grads = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    pipeline = Pipeline(model, ["cpu", "cpu"])
    for batch in batches:
        pipeline.step([batch], square_loss)
    assert_close(gradients(model), grads, 1e-10)


@pytest.mark.parametrize("failing", [0, 2, 5])
@pytest.mark.parametrize("where", ["forward", "block", "loss", "backward"])
def test_a_failing_micro_batch_ends_the_step_with_its_own_error_and_leaves_no_thread(where, failing):
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("broken in backward")

    here = threading.local()

    def forward(model: nn.Module, numbered: tuple[int, dict]) -> torch.Tensor:
        here.number = numbered[0]
        if numbered[0] == failing and where == "forward":
            raise ArithmeticError("broken in forward")
        return model(**numbered[1])

    def inside_a_recomputed_block(*_: object) -> None:
        if here.number == failing and where == "block":
            raise ArithmeticError("broken in block")

    def loss(output, numbered: tuple[int, dict]) -> torch.Tensor:
        value = square_loss(output, numbered[1])
        if numbered[0] == failing and where == "loss":
            raise ArithmeticError("broken in loss")
        return Break.apply(value) if numbered[0] == failing else value

    batches = [(n, make_micro_batch("t2v", torch.float32, n)) for n in range(6)]
    model = make_wan("t2v", torch.float32)
    model.blocks[3].ffn.register_forward_hook(inside_a_recomputed_block)
    pipeline = Pipeline(model, ["cpu"] * 3, residency="recompute", forward=forward)
    before = set(threading.enumerate())
    with pytest.raises(ArithmeticError, match=f"broken in {where}"):
        pipeline.step(batches, loss)
    assert set(threading.enumerate()) <= before
    model.zero_grad()
    good = [batch for n, batch in batches if n != failing]
    _, grads = run_unsplit(make_wan("t2v", torch.float32), good)
    pipeline.step([(-1, batch) for batch in good], loss)
    assert_close(gradients(model), grads, 1e-5)


def test_a_thread_that_cannot_be_started_ends_the_step(monkeypatch):
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if thread.name.startswith("tworeel") and not thread.name.endswith("_0"):
            raise RuntimeError("can't start new thread")
        start(thread)

    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(3)]
    _, grads = run_unsplit(make_wan("t2v", torch.float32), batches)
    model = make_wan("t2v", torch.float32)
    pipeline = Pipeline(model, ["cpu", "cpu"])
    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pipeline.step(batches, square_loss)
    monkeypatch.setattr(threading.Thread, "start", start)
    model.zero_grad()
    pipeline.step(batches, square_loss)
    assert_close(gradients(model), grads, 1e-5)


def test_a_trained_parameter_that_several_stages_read_has_the_same_gradient_each_time():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * self.scale
            for block in self.blocks:
                x = block(x)
            return x * self.scale

    torch.manual_seed(0)
    batches, model = [torch.randn(8, 64) for _ in range(6)], Scaled()
    pipeline = Pipeline(model, ["cpu"] * 3)
    found = []
    for _ in range(10):
        model.zero_grad()
        pipeline.step(batches, lambda output, _: output.square().mean())
        found.append(model.scale.grad)
    assert all(torch.equal(one, found[0]) for one in found)


def test_the_autocast_of_the_caller_holds_in_the_carrying_threads():
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        losses, grads = run_unsplit(make_wan("t2v", torch.float32), batches)
        model = make_wan("t2v", torch.float32)
        result = Pipeline(model, ["cpu", "cpu"]).step(batches, square_loss)
    assert all(torch.equal(a, b) for a, b in zip(result.losses, losses, strict=True))
    assert_close(gradients(model), grads, 1e-5)


def test_the_context_of_the_caller_holds_in_the_carrying_threads():
    """torch keeps the settings of its compiler there."""
    mark = ContextVar("mark", default="none")
    mark.set("the caller's")
    seen = []

    def loss(output, batch):
        seen.append(mark.get())
        return square_loss(output, batch)

    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in range(3)]
    Pipeline(make_wan("t2v", torch.float32), ["cpu", "cpu"]).step(batches, loss)
    assert seen == ["the caller's"] * 3


def test_stages_work_at_the_same_time_and_the_timeline_shows_it():
    class Sleep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return x * self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Sleep() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    pipeline = Pipeline(Model(), ["cpu", "cpu"], residency="recompute")
    spans = pipeline.step([torch.ones(1)] * 6, lambda y, _: y.sum(), timed=True).spans
    assert len(spans) == 2 * 2 * 6
    together = [
        (a, b)
        for a in spans
        for b in spans
        if a.action.stage < b.action.stage and a.start < b.end and b.start < a.end
    ]
    assert together
    # One after the other, each would be busy half of the time; without other load it is 0.85.
    assert all(share > 0.55 for share in busy_shares(spans, 2))


def test_micro_batches_may_be_mappings_tuples_or_single_tensors():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    x = torch.ones(1, 2)
    pipeline = Pipeline(Model(), ["cpu", "cpu"])
    losses = pipeline.step([x, (x,), [x], {"x": x}], lambda y, _: y.sum()).losses
    assert len({loss.item() for loss in losses}) == 1


def test_all_steps_run_in_the_same_threads_which_end_with_the_pipeline():
    """cuDNN keeps its plans by thread: each new one would make them again in each step."""
    seen: list[set[threading.Thread]] = []

    class Block(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen[-1].add(threading.current_thread())
            time.sleep(0.01)
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(2, 2) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    pipeline = Pipeline(Model(), ["cpu", "cpu"])
    for count in (1, 4, 4, 1):
        seen.append(set())
        pipeline.step([{"x": torch.ones(1, 2)}] * count, lambda y, _: y.sum())
    first, second, third, fourth = seen
    assert len(first) == 1 and len(second) > 1
    assert third <= second and fourth <= second
    del pipeline
    gc.collect()
    for thread in second:
        thread.join(10)
        assert not thread.is_alive()


def test_wrong_use_is_refused_with_what_to_do():
    model = make_wan("t2v", torch.float32)
    with pytest.raises(ValueError, match="give the devices, or split the model first"):
        Pipeline(model)
    pipeline = Pipeline(split(model, ["cpu", "cpu"]))
    with pytest.raises(ValueError, match="split already"):
        Pipeline(model, ["cpu"])
    with pytest.raises(ValueError, match="at least one micro-batch"):
        pipeline.step([], square_loss)
    with pytest.raises(RuntimeError, match="ran twice in one micro-batch"):
        Pipeline(model, forward=lambda m, b: (m(**b), m(**b))[1]).step(
            [make_micro_batch("t2v", torch.float32, 0)], square_loss
        )


def test_a_tensor_that_goes_from_stage_to_stage_uncut_is_explained():
    class Doubled(torch.autograd.Function):
        """Torch shows its call to nobody."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 2 * gradient

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.blocks[0](x).tanh()
            y = first
            for block in self.blocks[1:]:
                y = block(y)
            return y + Doubled.apply(first)

    with pytest.raises(RuntimeError, match="second time") as caught:
        Pipeline(Residual(), ["cpu", "cpu"]).step([torch.ones(1, 2)], lambda y, _: y.sum())
    assert "uses a tensor of an earlier stage between its blocks" in caught.value.__notes__[0]


def test_dropout_in_a_recomputed_block_is_refused():
    model = make_wan("t2v", torch.float32)
    model.blocks[1].attn1.to_out[1].p = 0.5
    model.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_out\.1: dropout of 0\.5"):
        Pipeline(model, ["cpu"], residency="recompute").step(
            [make_micro_batch("t2v", torch.float32, 0)], square_loss
        )


@pytest.mark.parametrize("place", ["attention", "path", "beside"])
def test_dropout_that_is_no_module_or_runs_beside_a_recomputed_block_is_refused(place):
    class Block(nn.Module):
        def __init__(self, dropped=0.0):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=dropped * (place == "attention"))
            self.drop_prob = dropped * (place == "path")
            self.drop = nn.Dropout(dropped * (place == "beside"))

        def forward(self, x):
            return self.drop(x + self.attention(x, x, x)[0])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(0.5 * (place != "beside")) for _ in range(2))
            self.side = Block(0.5)

        def forward(self, x):
            return self.blocks[1](self.side(self.blocks[0](x)))

    model = Model()
    split(model, ["cpu", "cpu"], residency="recompute", beside={"side": "blocks.0"})
    name = {"attention": r"blocks\.0\.attention", "path": r"blocks\.0", "beside": r"side\.drop"}[place]
    with pytest.raises(ValueError, match=f"^{name}: dropout of 0.5"):
        Pipeline(model).step([torch.randn(2, 3, 8)], lambda output, _: output.sum())


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_interleaved_stages_give_the_gradients_of_the_unsplit_model(count):
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(count)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    result = Pipeline(model, ["cpu:0", "cpu:1"] * 2, residency="recompute").step(batches, square_loss)
    torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
    assert_close(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("stages_per_device", [1, 2, 3])
def test_a_step_that_compiles_ends_and_holds_no_more_than_the_others(stages_per_device):
    class Runs:
        """Takes the compiler's place."""

        failed: frozenset = frozenset()

        def __call__(self, call, block, *args, **kwargs):
            return call(block, *args, **kwargs)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    for count in range(1, 10):
        pipeline = Pipeline(Model(), ["cpu:0", "cpu:1"] * stages_per_device)
        pipeline.split.compiler = Runs()
        orders = pipeline._orders(batches := [torch.randn(2, 4)] * count)
        most = pipeline._depths(count)
        assert all(a <= b for a, b in zip(most_in_flight(orders, 2 * stages_per_device), most, strict=True))
        pipeline._compiled_for.clear()
        assert len(pipeline.step(batches, lambda output, _: output.sum()).losses) == count


def test_stages_of_one_device_give_the_gradients_of_the_unsplit_model(monkeypatch):
    # A CPU's stages would run side by side.
    monkeypatch.setattr(pipeline_module, "make_orders", lambda _, count, **_how: make_orders("aa", count))
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(3)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    result = Pipeline(model, ["cpu", "cpu"], slack=1).step(batches, square_loss, timed=True)
    torch.testing.assert_close(list(result.losses), losses, rtol=1e-10, atol=0)
    assert_close(gradients(model), expected, 1e-10)
    assert [span.action.micro_batch for span in result.spans] == [0] * 4 + [1] * 4 + [2] * 4
