from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tworeel.benchmarks.preparing import Settings
from tworeel.benchmarks.results import CaseResult
from tworeel.benchmarks.run import Bench
from tworeel.benchmarks.shapes import Case
from tworeel.errors import UserError

Run = Callable[..., Any]
NEEDS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files, also from root")
TINY = ("bench", "--tiny", "--tokens", "16", "--rank", "2", "--rounds", "1", "--micro-batches", "3")


def test_a_tiny_bench_prints_a_ratio_and_a_cosine_and_writes_all_figures(run: Run, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "figures" / "bench.json", "--timeline", tmp_path / "steps")
    done = run(*TINY, "--devices", "cpu,cpu", "--eager", "--compare", "naive", "--check", *files)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "figures" / "bench.json").read_text(encoding="utf-8"))
    (case,) = found["cases"]
    assert case["fits"] and case["tokens"] == 16 and case["speedup"] > 0
    assert case["measured"]["agreement"]["worst_cosine"] >= 0.9999
    assert case["settings"]["devices"] == ["cpu", "cpu"]
    assert case["planned"] is None and case["settings"]["split_at"] is None  # on CPUs all is even
    assert "faster than naive" in done.out and "cosine 1.000" in done.out
    trace = json.loads(
        (tmp_path / "steps" / "tiny-16-tokens-3-a-step-fp32.trace.json").read_text(encoding="utf-8")
    )
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 2 * 2 * 3
    assert (tmp_path / "steps" / "tiny-16-tokens-3-a-step-fp32.png").stat().st_size > 5000


def test_several_precisions_and_steps_are_cases_of_one_table(run: Run, tmp_path: Path) -> None:
    several = ("--micro-batches", "2", "--precision", "bf16", "--precision", "fp8", "--compare", "naive")
    done = run(*TINY, *several, "--devices", "cpu,cpu", "--eager", "--json", tmp_path / "bench.json")
    assert done.code == 0, done.err
    cases = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["cases"]
    assert [(case["case"]["micro_batches"], case["precision"]) for case in cases] == [
        (3, "fp32"),
        (2, "fp32"),
        (3, "fp8"),
        (2, "fp8"),
    ]
    assert done.out.count("one micro-batch at a time with per-block device hooks ...") == 1
    assert len({case["naive"]["seconds_per_clip"] for case in cases}) == 1


def test_a_comparison_that_ends_early_shows_what_was_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.run

    def once(self: Bench, case: Case, settings: Settings) -> CaseResult:
        if settings.quantize is not None:
            raise UserError("the lights went out")
        return measure(self, case, settings)

    monkeypatch.setattr(Bench, "run", once)
    done = run(*TINY, "--precision", "bf16", "--precision", "fp8", "--devices", "cpu,cpu", "--eager")
    assert done.code != 0 and "the lights went out" in done.err
    assert "each stage busy" in done.out


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_a_gpu_a_tiny_model_runs_and_that_is_said(run: Run) -> None:
    done = run("bench", "--rounds", "1", "--micro-batches", "2", "--rank", "2")
    assert done.code == 0, done.err
    assert "There is no GPU: a tiny model on cpu,cpu" in done.out
    assert "tiny on cpu, cpu" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "imgae-1024"], "--shapes imgae-1024: must be"),
        (["--shapes", "832x480x48"], "frames must be 4k+1"),
        (["--tokens", "7919"], "--tokens 7919: must be a product of two numbers"),
        (["--model", "wan-15b"], "--model wan-15b: must be one of"),
        (["--devices", "cpu,cuda:77"], "--devices: 'cuda:77' does not exist"),
        (["--tiny", "--devices", "cpu", "--cap-gib", "1"], "--cap-gib: the memory of cpu cannot be limited"),
        (["--split-at", "x"], "--split-at x: must be whole numbers"),
        (["--check"], "--check: needs --compare naive"),
        (["--tiny", "--devices", "cpu", "--cpp-wrapper"], "--cpp-wrapper: what is not compiled"),
        (["--tiny", "--devices", "cpu,cpu", "--split-at", "9"], "--devices, --split-at: at=[9]"),
        (
            ["--tiny", "--devices", "cpu,cpu", "--streamed", "9,1"],
            "--streamed: streamed=[9, 1]: stage 0 has 2",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(run: Run, arguments: list[str], words: str) -> None:
    done = run("bench", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ") and words in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "path", "words"),
    [
        ("--json", "file/bench.json", "cannot be written: "),
        ("--json", "folder", "is a folder; must be the name of a file"),
        ("--timeline", "file", "cannot be written: "),
        pytest.param("--json", "/proc/bench.json", "cannot be written: ", marks=NEEDS_PROC),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    run: Run, tmp_path: Path, option: str, path: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    done = run(*TINY, "--devices", "cpu,cpu", option, tmp_path / path)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith(f"error: {option} {tmp_path / path}: {words}")
    assert len(done.err.splitlines()) == 1


def test_all_that_does_not_suit_the_model_is_told_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "tworeel.quant.nf4", raising=False)
    options = ("--streamed", "1,1", "--residency", "keep", "--precision", "nf4", "--cap-gib", "1")
    done = run(*TINY, "--devices", "cpu,cpu", *options, "--compare", "naive", "--json", tmp_path)
    assert done.code == 2 and done.out == ""
    cap, streamed, precision, file = done.err.splitlines()
    assert "--cap-gib: the memory of cpu" in cap and "--precision nf4: nf4 needs bitsandbytes" in precision
    assert "--streamed: block 1: its weights are streamed" in streamed and "is a folder" in file


def test_all_that_cannot_be_read_is_told_at_once(run: Run) -> None:
    shapes = ("--shapes", "1x1", "--shapes", "832x480x48")
    done = run("bench", "--check", "--split-at", "x", "--streamed", "y", *shapes, "--devices", "cuda:77")
    assert done.code == 2
    words = [line.split(":")[1].split()[0] for line in done.err.splitlines()]
    assert words == ["--check", "--split-at", "--streamed", "--shapes", "--shapes", "--devices"]


def test_an_unknown_choice_exits_with_2(run: Run) -> None:
    assert run("bench", "--compare", "nothing").code == 2


def test_a_tiny_flux2_is_measured_against_the_naive_run(run: Run, tmp_path: Path) -> None:
    options = ("--devices", "cpu,cpu", "--eager", "--rounds", "1", "--compare", "naive", "--check")
    files = ("--json", tmp_path / "bench.json", "--timeline", tmp_path / "steps")
    done = run("bench", "--model", "flux2-dev", "--tiny", "--precision", "fp8", *options, *files)
    assert done.code == 0, done.err
    (case,) = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["cases"]
    assert case["case"]["model"]["name"] == "tiny-flux2" and case["settings"]["rank"] == 16
    assert case["speedup"] > 0 and case["naive"]["precision"] == "fp32"
    assert "s an image; " in done.out and "images a step" in done.out
    assert (tmp_path / "steps" / "tiny-flux2-64-tokens-4-a-step-fp8.png").is_file()
