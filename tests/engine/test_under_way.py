"""Which micro-batch a thread carries."""

from __future__ import annotations

import threading

import torch
from torch import nn

from tworeel.engine import place
from tworeel.engine.under_way import UnderWay


class Open:
    """A gate that lets everyone through."""

    def advance(self, stage: int, to: int) -> None:
        """At once."""


def under_way() -> UnderWay:
    """Of a model of two stages."""
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(2))})
    return UnderWay(place(model, ["cpu", "cpu"]))


def test_a_thread_knows_its_own_micro_batch_until_its_forward_is_done():
    open_passages, seen = under_way(), []
    with open_passages.passage() as passage:
        thread = threading.Thread(target=lambda: seen.append(open_passages.current()))
        thread.start()
        thread.join()
        assert seen == [None]
        assert open_passages.current() is passage
        passage.done = True
        assert open_passages.current() is None
    assert open_passages.current() is None


def test_another_thread_gets_what_stands_for_a_tensor_on_a_stage_while_its_micro_batch_is_under_way():
    open_passages, x = under_way(), torch.ones(1, requires_grad=True)
    with open_passages.passage(Open()) as passage:
        (there,) = passage.arrive(1, (x,), block=True)
        found = []
        thread = threading.Thread(target=lambda: found.extend(open_passages.recall(1, [x, "word"])))
        thread.start()
        thread.join()
        assert found[0] is there and found[1] == "word"
    assert open_passages.recall(1, x) is not there
