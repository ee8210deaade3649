"""The comparison of DiffSynth's scripts with one card, hooks and ours, as it is run by hand, at toy size."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BENCH = HERE.parents[1] / "bench" / "diffsynth_scripts.py"
BLOCK_LAYERS = 10
"""That get a LoRA in a block of Wan's."""
pytestmark = [pytest.mark.usefixtures("diffsynth_package"), pytest.mark.slow]


def run(folder: Path, script: str, *words: str) -> tuple[str, dict[str, Any]]:
    """Run it, in this process: each case has its own; return what it printed, and its results by case."""
    command = [str(BENCH), "--tiny", "--script", str(HERE / script), "--folder", str(folder), *words]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", command)
        patch.syspath_prepend(str(BENCH.parent))
        runpy.run_path(str(BENCH), run_name="__main__")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    return printed.getvalue(), {result["case"]: result for result in results}


def assert_trains(result: dict[str, Any], layers: int) -> None:
    """All of the LoRA has a gradient, and DiffSynth loads what was saved."""
    assert result.get("seconds", 0) > 0, result
    (gradients,) = result["lora_gradients"].values()
    assert gradients["not_zero"] == gradients["tensors"] == 2 * layers and gradients["norm"] > 0
    assert result["lora_file"] == {"keys": 2 * layers, "layers": layers}


def test_every_way_to_run_the_script_is_timed_and_trains(tmp_path: Path) -> None:
    printed, results = run(tmp_path, "script.py", "--blocks", "2")
    assert len(results) == 5
    one_card = results.pop("one card, fp8")
    assert one_card["seconds"] > 0
    # test_defects.py says why.
    assert one_card["lora_gradients"]["cpu"]["not_zero"] == one_card["lora_file"]["layers"] == 0
    for result in results.values():
        assert_trains(result, 2 * BLOCK_LAYERS)
    assert "| per-block hooks |" in printed and "| 40 of 40 on cpu | 20 layers of 40 tensors |" in printed


def test_with_encoders_in_the_run_all_networks_may_be_fp8(tmp_path: Path) -> None:
    cases = ("one card, fp8", "split, overlapping, fp8")
    _, results = run(tmp_path, "script.py", "--task", "sft", "--cases", *cases)
    assert results["one card, fp8"]["seconds"] > 0
    assert_trains(results["split, overlapping, fp8"], 4 * BLOCK_LAYERS)


def test_flux2_is_trained_on_what_the_script_has_encoded_before(tmp_path: Path) -> None:
    words = ("--model", "flux2", "--text-layers", "3", "--cases", "data process")
    _, results = run(tmp_path, "script_flux2.py", *words, "one card, fp8", "split, overlapping")
    assert results["data process"]["cached"] == 4
    for name in ("one card, fp8", "split, overlapping"):
        assert_trains(results[name], 28)


def test_a_case_that_fails_says_why_in_table_and_results(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise RuntimeError('no such thing')", encoding="utf-8")
    printed, results = run(tmp_path, str(script), "--cases", "per-block hooks")
    assert "RuntimeError: no such thing" in printed and "| per-block hooks | failed |" in printed
    assert "RuntimeError: no such thing" in results["per-block hooks"]["error"]
