"""The comparison of 8 and 4 bits with bf16 runs as it is run by hand, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_scripts import read, run


@pytest.mark.parametrize(("model", "name"), [("wan-14b", "tiny"), ("flux2-dev", "tiny-flux2")])
def test_the_precision_of_each_kind_is_measured(tmp_path: Path, model: str, name: str) -> None:
    options = ("--model", model, "--kinds", "fp8,int8", "--blocks", "2", "--json", tmp_path / "x.json")
    printed = run("precision.py", *options)
    found = read(tmp_path / "x.json")[f"precision {name}"]
    assert "LoRA gradient" in printed and f"{name}, 2 blocks" in printed
    assert 0.99 < found["fp8"]["gradient_cosine"] < found["int8"]["gradient_cosine"] < 1
    assert found["int8"]["output_error"] < 0.01
