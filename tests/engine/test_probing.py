"""What a block takes, beside its inputs and outputs. Bytes of a device are measured in tests/gpu."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tworeel.engine import probing
from tworeel.engine.fitting import StageMemory
from tworeel.engine.footprints import Footprint
from tworeel.engine.probing import Forward, Head, Probe, own_copies
from tworeel.engine.schedule import Held

KEEP = Footprint(kept=20, working=10, hidden=1)
MEMORY = StageMemory(available=10_000, num_blocks=10, may_keep=10, held=Held(2, 2, 2))


def test_a_probe_finds_what_all_blocks_are_given_alike(monkeypatch):
    monkeypatch.setattr(probing, "_after_warm_up", lambda measure: KEEP)
    probe = Probe([MEMORY, None])
    hidden, text, table = torch.zeros(1, 8, 4), torch.zeros(1, 5, 4), torch.zeros(8, 2)
    inputs = ((hidden, text), {"rotary_emb": (table, table)})
    for stage in (0, 1):
        probe.measure(stage, "blocks", torch.device("cpu"), nn.Identity(), None, *inputs, hidden)
    assert probe.memories[0] == replace(MEMORY, inputs=text.nbytes + 2 * table.nbytes)
    assert probe.memories[1] is None


def test_of_a_forward_alone_there_is_left_what_it_saved():
    seen: dict[str, weakref.ref[torch.Tensor]] = {}
    weight = nn.Parameter(torch.ones(3))
    x = torch.arange(3.0).requires_grad_()

    def run(saves: bool, hidden: torch.Tensor) -> torch.Tensor:
        output = hidden * weight if saves else hidden + weight
        seen.update(input=weakref.ref(hidden.untyped_storage()), output=weakref.ref(output.untyped_storage()))
        return output

    for saves in (True, False):
        ran = Forward(partial(run, saves), [own_copies((x,))])
        gc.collect()
        assert (seen["input"]() is not None) is saves and seen["output"]() is None
        assert ran.hidden == x.nbytes
        ran.backward((x,), [weight])
    assert x.grad is None and weight.grad is None, "a probe leaves no gradient behind"


def test_the_head_is_gone_through_with_gradients_that_nothing_is_left_of():
    weight, hidden = nn.Parameter(torch.ones(3)), torch.arange(3.0)
    head, seen = Head(), []
    with torch.no_grad():
        fresh, ids = head.begin((hidden, torch.arange(2)))
        assert torch.is_grad_enabled() and fresh.requires_grad and not ids.requires_grad
        assert fresh.data_ptr() == hidden.data_ptr()
        fresh.register_hook(seen.append)
        output = {"sample": fresh * 2 * weight}
    assert torch.is_grad_enabled()
    head.end(output)
    assert [gradient.tolist() for gradient in seen] == [[2, 2, 2]]
    assert fresh.grad is None and weight.grad is None
    head.end(output)  # once is enough


def test_a_head_that_gives_nothing_with_a_gradient_is_left_alone():
    head = Head()
    with torch.no_grad():
        fresh = head.begin(torch.ones(3))
        output = fresh.detach()
    head.end((output, None))


def test_on_a_cpu_the_forward_goes_on_without_gradients():
    probe, hidden = Probe([None]), torch.zeros(1, 8, 4)
    assert probe.begin_head(0, torch.device("cpu"), (), hidden) is hidden
    probe.end_head(0, torch.device("cpu"), hidden)
    assert probe.memories == [None]
