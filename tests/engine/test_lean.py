"""Modules that can be asked to run as upstream's."""

from __future__ import annotations

from torch import nn

from tworeel.engine.lean import Lean, upstream_forwards


def test_modules_run_by_our_forward_unless_they_are_asked_for_upstreams() -> None:
    model, other = nn.Sequential(Lean(), nn.Linear(1, 1), Lean()), Lean()
    with upstream_forwards(model):
        assert not model[0].is_lean and not model[2].is_lean and other.is_lean
    assert model[0].is_lean and model[2].is_lean
