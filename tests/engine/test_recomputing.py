"""What a compiled block keeps of its frozen weights: nothing but references to what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy

from tworeel.engine import compiling
from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.recomputing import RecomputedWeights
from tworeel.engine.residency import plain_call
from tworeel.lora.inject import inject_lora
from tworeel.quant import quantize_blocks
from tworeel.quant.matmul import assumed_mode
from tworeel.quant.rows import dequantize_weight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDTH, HIDDEN = 64, 128
WEIGHT = WIDTH * HIDDEN
"""Numbers of each weight."""
KINDS = ("int8", "fp8", "nf4")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, dtype=torch.bfloat16)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """A feed-forward."""
        return x + self.down(functional.gelu(self.up(x)))


def make_block(kind: str) -> nn.Module:
    """A block with a LoRA that has learned something, in `kind`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    quantize_blocks(model, kind, ["blocks.0.up", "blocks.0.down"])
    inject_lora(model, rank=4, alpha=4, targets=["up", "down"], block_lists=["blocks"])
    block = model.get_submodule("blocks.0")
    for parameter in trained(block):
        nn.init.normal_(parameter, std=0.1)
    return block


def trained(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


@dataclass
class Ran:
    saved: list[Tensor]
    """For the backward; neither weights nor other tensors of the block."""
    results: list[Tensor]
    """Output and gradients."""


@cache
def run_compiled(kind: str, mode: str, *, as_torch_does: bool = False) -> Ran:
    """Run a block forward and backward as the engine compiles it, or without our marks in its graph."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    block = make_block(kind)
    own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    saved = []
    x = torch.randn(2, 16, WIDTH).bfloat16().requires_grad_()
    with assumed_mode(mode), pytest.MonkeyPatch.context() as patches:  # type: ignore[arg-type]
        if as_torch_does:
            patches.setattr(compiling, "joint_pass", lambda **_: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = BlockCompiler()(plain_call(Block), block, x)
        y.float().square().sum().backward()
    gradients = [parameter.grad for parameter in trained(block)]
    kept = [tensor for tensor in saved if id(tensor) not in own]
    return Ran(saved=kept, results=[y.detach(), *(g for g in (x.grad, *gradients) if g is not None)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_keeps_no_weight_that_it_has_dequantized(kind: str) -> None:
    ran = run_compiled(kind, "weight-only")
    assert ran.saved and not any(tensor.numel() >= WEIGHT for tensor in ran.saved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_dequantized_again_give_the_same_bits(kind: str) -> None:
    ours, theirs = (run_compiled(kind, "weight-only", as_torch_does=torchs) for torchs in (False, True))
    assert any(tensor.numel() == WEIGHT for tensor in theirs.saved), "or torch does it by itself now"
    assert len(ours.results) == len(theirs.results) == 6
    assert all(torch.equal(one, other) for one, other in zip(ours.results, theirs.results, strict=True))


@pytest.mark.slow
def test_a_block_keeps_as_much_as_where_its_weights_are_multiplied_in_8_bits() -> None:
    stored, multiplied = (
        sum(tensor.nbytes for tensor in run_compiled("int8", mode).saved)
        for mode in ("weight-only", "tensorwise")
    )
    assert stored == pytest.approx(multiplied, rel=0.03)


def graph_of(function: object, *inputs: Tensor) -> fx.Graph:
    with FakeTensorMode() as fakes:
        graph = make_fx(function)(*map(fakes.from_tensor, inputs)).graph
    RecomputedWeights()(graph)
    return graph


def marked(graph: fx.Graph) -> list[str]:
    """Names of the operations that are to be repeated."""
    found = [node for node in graph.nodes if "recompute" in node.meta]
    assert all(node.meta["recompute"] == CheckpointPolicy.MUST_RECOMPUTE for node in found)
    return [node.target.overloadpacket.__name__ for node in found]


def stored() -> tuple[Tensor, Tensor]:
    return torch.zeros(HIDDEN, WIDTH, dtype=torch.int8), torch.ones(HIDDEN)


def test_only_what_is_made_of_quantized_weights_alone_is_made_again() -> None:
    def function(x: Tensor, down: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
        weight = dequantize_weight(quantized, scales, (HIDDEN, WIDTH), torch.bfloat16)
        # The input of the block is a graph's input as weights are, and so are the LoRA's.
        return functional.linear(x * 2, weight).sin() @ down.bfloat16()

    x, down = torch.ones(3, WIDTH, dtype=torch.bfloat16), torch.ones(HIDDEN, 4)
    graph = graph_of(function, x, down, *stored())
    assert marked(graph) == ["_to_copy", "mul_", "view", "_to_copy", "t"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool])
def test_nothing_is_made_again_where_no_weight_is_quantized(dtype: torch.dtype) -> None:
    assert not marked(graph_of(lambda x, y: x.float().sin() * y, torch.ones(4), torch.ones(4, dtype=dtype)))


def test_weights_that_are_multiplied_as_they_are_stay_as_they_are() -> None:
    def function(x: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
        product = torch._int_mm(x.round().to(torch.int8), quantized.t())
        return (product * scales).bfloat16()

    assert not marked(graph_of(function, torch.ones(32, WIDTH), *stored()))
