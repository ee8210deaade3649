from __future__ import annotations

import pytest
import torch

from tworeel.sampling.stand_ins import NotYet, StandIn, missing, remembered


def stand_in(answer) -> StandIn:
    return StandIn({"in_channels": 16}, torch.device("cpu"), torch.bfloat16, answer)


def test_it_looks_like_a_transformer_of_one_device_and_one_precision() -> None:
    found = stand_in(lambda x, scale: (x * scale,))
    assert (found.config["in_channels"], found.device, found.dtype) == (
        16,
        torch.device("cpu"),
        torch.bfloat16,
    )
    with found.cache_context("cond", step_index=1):
        assert found(torch.ones(2), scale=3)[0].tolist() == [3, 3]
    assert not list(found.parameters())


def test_answers_are_remembered_in_their_order() -> None:
    found = stand_in(remembered([(torch.zeros(1),), (torch.ones(1),)]))
    assert [float(found(torch.rand(4))[0]) for _ in range(2)] == [0, 1]


def test_what_is_not_loaded_breaks_off() -> None:
    with pytest.raises(NotYet):
        stand_in(missing)(torch.ones(1))
