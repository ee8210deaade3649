"""The optimizer's state, bit by bit, over other groups and other parameter orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tworeel.config.schema import TrainConfig
from tworeel.training.checkpoint import CheckpointError, CheckpointStore
from tworeel.training.optimizer import make_optimizer
from tworeel.training.optimizer_state import optimizer_tensors, restore_optimizer

SHAPES = {"a": (4, 6), "b": (6, 3), "c.weight": (5,), "d": (2, 2)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=made).to(dtype)) for name, shape in SHAPES.items()
    }


def steps(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for number, (name, parameter) in enumerate(named.items()):
            made = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(parameter.shape, generator=made).to(parameter.dtype)
            parameter.grad = None if name == "d" else gradient  # `d` never has a gradient, so no state
        optimizer.step()


def through_disk(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> tuple[Any, Any]:
    store = CheckpointStore(folder)
    loaded = store.load(store.save(1, {"optimizer": tensors}, {"optimizer": state}))
    return loaded.tensors["optimizer"], loaded.state["optimizer"]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_adamw_goes_on_bit_by_bit(tmp_path: Path, fused: bool | None, dtype: torch.dtype) -> None:
    def build(named: dict[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.1, fused=fused)

    straight = parameters(dtype)
    whole = build(straight, 1e-2)
    steps(whole, straight, 0, 5)
    saved = through_disk(tmp_path, *optimizer_tensors(whole, list(SHAPES)))
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    steps(whole, straight, 5, 10)

    again = build(resumed, 0.5)
    restore_optimizer(again, list(SHAPES), *saved)
    steps(again, resumed, 5, 10)
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)
    assert again.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_another_split_into_groups_restores_the_same() -> None:
    named = parameters()
    one = torch.optim.AdamW(named.values(), lr=1e-2)
    steps(one, named, 0, 3)
    tensors, state = optimizer_tensors(one, list(SHAPES))

    others = parameters()
    order = ["c.weight", "d", "a", "b"]
    groups = [{"params": [others["c.weight"], others["d"]]}, {"params": [others["a"], others["b"]]}]
    two = torch.optim.AdamW(groups, lr=0.5)
    restore_optimizer(two, order, tensors, state)
    for name in ("a", "b", "c.weight"):
        kept, back = one.state[named[name]], two.state[others[name]]
        assert kept.keys() == back.keys() and all(torch.equal(kept[key], back[key]) for key in kept)
    assert others["d"] not in two.state
    assert [group["lr"] for group in two.param_groups] == [1e-2, 1e-2]


def test_the_restored_state_shares_no_memory_with_the_checkpoint() -> None:
    named = parameters()
    optimizer = torch.optim.AdamW(named.values())
    steps(optimizer, named, 0, 1)
    tensors, state = optimizer_tensors(optimizer, list(SHAPES))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = torch.optim.AdamW(parameters().values())
    restore_optimizer(other, list(SHAPES), kept, state)
    for entries in other.state.values():
        entries["exp_avg"].zero_()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())


def test_a_resumed_eight_bit_adamw_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """bitsandbytes keeps small parameters in fp32, large ones as bytes with tables and scales."""

    def build() -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
        made = torch.Generator().manual_seed(0)
        large, small = (nn.Parameter(torch.randn(shape, generator=made)) for shape in ((128, 64), (8, 8)))
        return large, small, make_optimizer([large, small], TrainConfig(optimizer="adamw8bit"))

    names = ["large", "small"]
    *straight, whole = build()
    steps(whole, dict(zip(names, straight, strict=True)), 0, 2)
    saved = through_disk(tmp_path, *optimizer_tensors(whole, names))
    assert saved[0]["large.state1"].dtype is torch.uint8
    *resumed, again = build()
    with torch.no_grad():
        for mine, theirs in zip(resumed, straight, strict=True):
            mine.copy_(theirs)
    restore_optimizer(again, names, *saved)
    steps(whole, dict(zip(names, straight, strict=True)), 2, 4)
    steps(again, dict(zip(names, resumed, strict=True)), 2, 4)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, straight, strict=True))


def test_an_optimizer_that_does_not_fit_is_refused_with_every_reason() -> None:
    named = parameters()
    optimizer = torch.optim.AdamW(named.values())
    steps(optimizer, named, 0, 1)
    tensors, state = optimizer_tensors(optimizer, list(SHAPES))
    other = torch.optim.SGD([torch.zeros(4, 7), torch.zeros(6, 3), torch.zeros(5), torch.zeros(1)])
    with pytest.raises(CheckpointError) as caught:
        restore_optimizer(other, ["a", "b", "c.weight", "new"], tensors, state)
    assert caught.value.problems == (
        "the checkpoint has the state of AdamW, this run uses SGD",
        "parameter new is not in the checkpoint",
        "parameter d is only in the checkpoint",
        "parameter a has shape [4, 7], in the checkpoint [4, 6]",
    )
    assert not other.state


def test_a_group_over_parameters_with_different_options_is_refused() -> None:
    named = parameters()
    groups = [{"params": [named["a"], named["b"]], "lr": 1.0}, {"params": [named["c.weight"], named["d"]]}]
    tensors, state = optimizer_tensors(torch.optim.AdamW(groups), list(SHAPES))
    with pytest.raises(CheckpointError, match="group 0 joins parameters saved with different options"):
        restore_optimizer(torch.optim.AdamW(parameters().values()), list(SHAPES), tensors, state)
