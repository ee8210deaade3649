"""Norms of compiled blocks: one operation in the graph, PyTorch's own kernel in what is generated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy

from tworeel.engine import norms
from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.norms import RecomputedCasts, WholeNorms, keep_norms_whole, layer_norm, rms_norm
from tworeel.engine.residency import plain_call

ROWS, WIDTH = 64, 512
ops = torch.ops.tworeel


class Block(nn.Module):
    """Norms of each kind between what a compiler joins them with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.plain = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.affine = nn.LayerNorm(WIDTH)
        self.rms = nn.RMSNorm(WIDTH, eps=1e-6)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.to(dtype).requires_grad_(False)
        nn.init.normal_(self.affine.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.affine((2 * x).float().to(self.affine.weight.dtype)) + x
        scaled: Tensor = 3 * self.plain(x.float())
        return self.linear(self.rms(scaled.to(x.dtype)))


def made(dtype: torch.dtype = torch.float32, *, weight: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, ROWS, WIDTH, dtype=dtype, requires_grad=True)
    return x, torch.randn(WIDTH, dtype=weight or dtype)


def targets(graph: fx.Graph) -> list[object]:
    return [getattr(node.target, "overloadpacket", node.target) for node in graph.nodes]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_in_a_compiled_block_gives_the_bits_that_it_gives_without(dtype: torch.dtype) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH, eps=1e-6, dtype=dtype).requires_grad_(False)
            nn.init.normal_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x * 2) * 2  # exact in whichever precision

    block, compiler, call = Normed(), BlockCompiler(), plain_call(Normed)
    x, _ = made(dtype)
    gradient = torch.randn_like(x)
    found, expected = (run(block, x) for run in (lambda b, t: compiler(call, b, t), nn.Module.__call__))
    assert torch.equal(found, expected) and not compiler.failed
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, expected)))


def test_in_a_graph_norms_are_one_operation_also_within_a_checkpoint() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(Block())
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x))

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, fx.GraphModule)

    outer = Outer()
    graph = fx.GraphModule(outer, Leaves().trace(outer))
    keep_norms_whole(graph)
    inner = graph.get_submodule("inner")
    assert isinstance(inner, fx.GraphModule)
    assert layer_norm in targets(graph.graph) and functional.layer_norm not in targets(graph.graph)
    x, _ = made()
    torch.testing.assert_close(graph(x), outer(x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_norm_is_one_operation_forward_and_backward(fused: bool) -> None:
    block = Block(torch.bfloat16)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x).sum(), x)

    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        x = fakes.from_tensor(made(torch.bfloat16)[0])
        if fused:
            with WholeNorms():
                graph = make_fx(run)(x).graph
        else:
            graph = make_fx(run)(x).graph
    found = targets(graph)
    counts = [found.count(getattr(ops, name)) for name in ("layer_norm", "layer_norm_backward")]
    assert counts == ([2, 2] if fused else [0, 0])
    counts = [found.count(getattr(ops, name)) for name in ("rms_norm", "rms_norm_backward")]
    assert counts == ([1, 1] if fused else [0, 0])


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("why", ["trained", "autocast"])
def test_a_norm_that_is_trained_or_cast_by_autocast_is_left_to_torch(monkeypatch, norm, why) -> None:
    def never(*_: object) -> None:
        raise AssertionError("one operation")

    monkeypatch.setattr(norms, f"_{norm.__name__}", never)
    theirs = getattr(torch, norm.__name__)
    options = {"fused": True} if norm is rms_norm else {}
    x, weight = made(torch.bfloat16 if why == "autocast" else torch.float32)
    weight.requires_grad_(why == "trained")
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert torch.equal(
            norm(x, (WIDTH,), weight, eps=1e-6, **options), theirs(x, (WIDTH,), weight, eps=1e-6)
        )


def test_an_rms_norm_is_left_to_torch_where_torch_composes_it() -> None:
    x, weight = made(torch.bfloat16, weight=torch.float32)
    assert torch.equal(rms_norm(x, (WIDTH,), weight, fused=True), torch.rms_norm(x, (WIDTH,), weight))
    x, weight = made()
    assert not norms._has_fused_rms_norm("cpu"), "PyTorch has no kernel for it there"
    assert torch.equal(rms_norm(x, (WIDTH,), weight), torch.rms_norm(x, (WIDTH,), weight))


def test_what_was_cast_for_a_norm_is_cast_again_for_its_backward() -> None:
    block = Block(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, WholeNorms():
        graph = make_fx(block)(fakes.from_tensor(made(torch.bfloat16)[0])).graph
    casts = graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    casts[-1].meta["ac_graph_id"] = 3
    RecomputedCasts()(graph)
    marked = [node for node in casts if "recompute" in node.meta]
    assert len(marked) == 1 and len(casts) > 2, "to fp32, and for a norm"
    assert marked[0].meta["recompute"] == CheckpointPolicy.MUST_RECOMPUTE
    assert marked[0].meta["ac_graph_id"] == 0


@pytest.mark.parametrize(("norm", "torchs"), [(layer_norm, torch.layer_norm), (rms_norm, torch.rms_norm)])
def test_a_norm_takes_what_torchs_takes_by_name(norm, torchs) -> None:
    x = torch.randn(2, 4)
    options = {"cudnn_enable": False} if norm is layer_norm else {}
    ours, theirs = (one(input=x, normalized_shape=(4,), eps=0.1, **options) for one in (norm, torchs))
    assert torch.equal(ours, theirs)
