from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from real_models import budgets_of, request_of

from tworeel.planning.measurements import FOLDER_VARIABLE, calibrated, keep
from tworeel.planning.precisions import eight_bit_kind, in_precision, less_precise_kinds


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "kind"),
    [("2x RTX 4090", "fp8"), ("2x RTX 3090", "int8"), ("RTX 4090, RTX 3060 12GB", "int8")],
)
def test_eight_bits_are_those_that_all_cards_multiply(gpus: str, kind: str) -> None:
    request = request_of(budgets=budgets_of(gpus))
    assert eight_bit_kind(request.budgets) == kind
    assert less_precise_kinds(request) == (kind, "nf4")


def test_cards_are_as_fast_as_runs_in_that_precision_have_found_them() -> None:
    request = request_of(budgets=budgets_of("RTX 4090"))
    (by_figures,) = request.budgets
    eight_bit = replace(request.trace, quantize="fp8")
    keep(by_figures.card, request.trace, 1.5)
    (slowed,) = budgets = (calibrated(by_figures, request.trace),)
    request = replace(request, budgets=budgets)
    # As long as no run has had fp8 weights, those of the others tell most of the card.
    assert in_precision(request, "fp8").budgets == (slowed,)
    keep(by_figures.card, eight_bit, 1.2)
    (found,) = in_precision(request, "fp8").budgets
    assert found.slowdown == pytest.approx(1.2)
    assert found.rates.bf16 == pytest.approx(by_figures.rates.bf16 / 1.2)
