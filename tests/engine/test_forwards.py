"""The forwards of a model's modules are taken over and given back."""

from __future__ import annotations

import copy

import pytest
import torch
from toy_wan import make_wan

from tworeel import split
from tworeel.engine.split import find_split


def test_remove_gives_the_model_back_as_it_was():
    model = make_wan("t2v", torch.float32)
    names = list(model.state_dict())
    division = split(model, ["cpu", "cpu"])
    assert find_split(model) is division
    with pytest.raises(ValueError, match="split already"):
        split(model, ["cpu"])
    division.remove()
    division.remove()  # a second time does nothing
    assert find_split(model) is None
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert list(model.state_dict()) == names
    split(model, ["cpu"])


def test_names_of_parameters_do_not_change():
    model = make_wan("t2v", torch.float32)
    names = list(model.state_dict())
    split(model, ["cpu", "cpu"])
    assert list(model.state_dict()) == names


def test_a_module_whose_forward_another_library_replaced_is_refused():
    model = make_wan("t2v", torch.float32)
    model.proj_out.forward = copy.copy(model.proj_out.forward)
    with pytest.raises(ValueError, match="replaced already"):
        split(model, ["cpu", "cpu"])
