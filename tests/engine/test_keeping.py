"""What a checkpoint keeps of some operations, and how little else it looks at."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tworeel.engine import keeping
from tworeel.engine.keeping import ATTENTION_OPS, keeping_contexts
from tworeel.engine.residency import is_kept

Block = Callable[[Tensor], Tensor]
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = Counter[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attentions(self) -> int:
        return sum(self.ran[op] for op in ATTENTION_OPS)


def plain(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).sigmoid()


def two(x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(x, x, x).sigmoid()
    return F.scaled_dot_product_attention(y, x.tanh(), y)


def by_its_operation(x: Tensor) -> Tensor:
    return CPU_ATTENTION(x, x, x)[0].sigmoid()


def by_its_overload(x: Tensor) -> Tensor:
    return CPU_ATTENTION.default(x, x, x)[0].sigmoid()


class Whole(nn.Module):
    """torch's own layer, whose function calls the attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        (x,) = x
        result: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return result


def run(block: Block, contexts: Any) -> tuple[Counting, Tensor]:
    """Forward and backward under a checkpoint; what ran, and the gradient."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    how = {} if contexts is None else {"context_fn": contexts}
    with Counting() as counting:
        checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **how).square().sum().backward()
    assert x.grad is not None
    return counting, x.grad


@pytest.mark.parametrize("only_attentions", [True, False])
@pytest.mark.parametrize("block", [plain, two, by_its_operation, by_its_overload, Whole()])
def test_an_attention_runs_once_however_it_is_called(block: Block, only_attentions: bool) -> None:
    again, expected = run(block, None)
    once, found = run(block, keeping_contexts(is_kept, only_attentions=only_attentions))
    assert torch.equal(found, expected)
    assert once.attentions > 0 and again.attentions == 2 * once.attentions


def test_other_operations_of_a_block_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watch(mode: Any) -> None:
        see = mode.__torch_dispatch__

        def seeing(self: Any, func: Any, *rest: Any) -> Any:
            seen.append(func)
            return see(self, func, *rest)

        monkeypatch.setattr(mode, "__torch_dispatch__", seeing)

    watch(keeping._Keeping)
    watch(keeping._Replaying)
    run(two, keeping_contexts(is_kept, only_attentions=True))
    assert set(seen) <= ATTENTION_OPS | {torch.ops.aten.detach.default}
    seen.clear()
    run(two, keeping_contexts(is_kept, only_attentions=False))
    assert torch.ops.aten.sigmoid.default in seen


def test_what_is_kept_can_be_put_somewhere_else() -> None:
    places: dict[int, Tensor] = {}

    def put(tensor: Tensor) -> int:
        places[len(places)] = tensor.clone()
        return len(places) - 1

    _, expected = run(two, None)
    _, found = run(two, keeping_contexts(is_kept, put, places.pop, only_attentions=True))
    assert torch.equal(found, expected)
    assert not places, "each was fetched once"


def test_what_is_kept_is_let_go_in_the_recomputation_and_had_once() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def put(tensor: Tensor) -> Tensor:
        seen.append(weakref.ref(tensor))
        return tensor

    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    contexts = keeping_contexts(is_kept, put, lambda tensor: tensor, only_attentions=True)
    loss = checkpoint(plain, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts).sum()
    assert all(tensor() is not None for tensor in seen)
    loss.backward(retain_graph=True)
    assert seen and all(tensor() is None for tensor in seen)
    with pytest.raises(RuntimeError, match="is had once"):
        loss.backward()


def test_results_that_are_written_into_are_refused() -> None:
    def block(x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(x, x, x)
        return attended.mul_(2).sigmoid()

    with pytest.raises(RuntimeError, match="was written into"):
        run(block, keeping_contexts(is_kept, only_attentions=True))
