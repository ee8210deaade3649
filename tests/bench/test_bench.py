"""The benchmarks run as they are run by hand, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_scripts import read, run


def test_the_whole_run_is_measured_from_the_written_model_to_the_lora(tmp_path: Path) -> None:
    printed = run("wan_a14b.py", "--folder", tmp_path, "--devices", "cpu,cpu")
    results = read(tmp_path / "wan_a14b.json")
    assert list(results) == ["write", "run", "resume", "compare"]
    assert [step["step"] for step in results["run"]["steps"]] == [1, 2, 3]
    assert [step["step"] for step in results["resume"]["steps"]] == [4]
    phases = [phase["name"] for phase in results["run"]["phases"]]
    assert phases == ["check", "cache", "load", "step 1", "step 2", "step 3", "checkpoint and LoRA"]
    assert results["resume"]["lora_layers"] == 40
    assert results["compare"]["ratio"] > 0
    assert "ratio" in printed
    assert (tmp_path / "model" / "high_noise_model" / "config.json").is_file()


@pytest.mark.parametrize("residency", ["keep", "recompute"])
def test_one_stage_is_compared_with_the_plain_model(tmp_path: Path, residency: str) -> None:
    options = ("--device", "cpu", "--eager", "--rounds", "2", "--residency", residency)
    printed = run("one_stage.py", *options, "--json", tmp_path / "one_stage.json")
    assert read(tmp_path / "one_stage.json")["one_stage"]["ratio"] > 0
    assert "ratio" in printed


def test_ways_to_run_blocks_are_compared_with_upstreams(tmp_path: Path) -> None:
    ways = ("upstream's", "ours", "compiled, exact")
    options = ("--device", "cpu", "--rounds", "1", "--residency", "keep", "--json", tmp_path / "ways.json")
    printed = run("block_ways.py", *options, "--ways", *ways, backend="aot_eager")
    (found,) = read(tmp_path / "ways.json")["block ways tiny 64 tokens"]["ways"].values()
    assert tuple(found) == ways and all(way in printed for way in ways)
    assert all(one["seconds"] > 0 for one in found.values())
    assert found["ours"]["equal"] == 1
    assert found["compiled, exact"]["worst_cosine"] > 0.999


def test_gradients_are_held_against_one_micro_batch_at_a_time_and_fp32(tmp_path: Path) -> None:
    ways = ("--residency", "recompute", "--compile", "both")
    options = ("--blocks", "2", "--micro-batches", "2", "--devices", "cpu,cpu")
    printed = run("gradients.py", *ways, *options, "--json", tmp_path / "gradients.json", backend="aot_eager")
    found = read(tmp_path / "gradients.json")["gradients tiny"]
    nudged = "the same, every 1000th number of the inputs in another last bit"
    assert list(found["ways"]) == ["one at a time, bf16", nudged, "recompute, eager", "recompute, compiled"]
    assert 0.9 < found["ways"][nudged]["naive"]["worst_cosine"] < found["ways"][nudged]["naive"]["cosine"] < 1
    assert found["ways"]["recompute, eager"]["naive"]["worst_cosine"] == pytest.approx(1)
    assert found["ways"]["recompute, compiled"]["naive"]["worst_cosine"] > 0.9999
    assert found["ways"]["recompute, compiled"]["fp32"]["cosine"] > 0.99
    assert found["repeats"] == {"recompute, eager": True, "recompute, compiled": True}
    assert printed.count("deterministic attention, twice: the same bits") == 2


def test_gradients_of_flux2_are_compared_for_each_residency(tmp_path: Path) -> None:
    ways = ("--model", "flux2-dev", "--residency", "keep", "offload-selective", "auto", "--compile", "no")
    options = ("--blocks", "3", "--micro-batches", "2", "--devices", "cpu,cpu")
    run("gradients.py", *ways, *options, "--json", tmp_path / "gradients.json")
    found = read(tmp_path / "gradients.json")["gradients tiny-flux2"]
    for residency in ("keep", "offload-selective", "auto"):
        agreement = found["ways"][f"{residency}, eager"]["naive"]
        assert agreement["worst_cosine"] == pytest.approx(1)
    assert found["repeats"] == {"keep, eager": True}


def test_the_cost_of_safety_is_measured(tmp_path: Path) -> None:
    printed = run("safety.py", "--rounds", "1", "--json", tmp_path / "safety.json")
    found = read(tmp_path / "safety.json")["safety"]
    for name in ("save", "verify", "hash", "fingerprint", "scan", "help"):
        assert found[name] > 0
    assert "tworeel --help" in printed
