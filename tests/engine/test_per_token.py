"""Tokens in parts, and modules that can be asked to leave them whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tworeel.engine import per_token
from tworeel.engine.per_token import PerToken, parts, undivided


@pytest.mark.parametrize(("shape", "dtype"), [((2, 100, 3, 8), torch.bfloat16), ((1, 7, 6), torch.float32)])
@pytest.mark.parametrize("limit", [1, 1000, 2**30])
def test_parts_are_all_tokens_in_order_and_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, limit: int
) -> None:
    monkeypatch.setattr(per_token, "PART_BYTES", limit)
    hidden = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = [hidden[:, part] for part in parts(hidden)]
    assert torch.equal(torch.cat(found, dim=1), hidden)
    assert all(part.numel() * 4 <= limit or part.shape[1] == 1 for part in found)
    assert (len(found) == 1) is (4 * hidden.numel() <= limit)


def test_modules_divide_unless_they_are_asked_not_to() -> None:
    model = nn.Sequential(PerToken(), nn.Linear(1, 1), PerToken())
    others = [PerToken()]
    with undivided(model):
        assert not model[0].divides and not model[2].divides and others[0].divides
    assert model[0].divides and model[2].divides
