"""What is refused before a script runs; most of it needs no DiffSynth."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tworeel.diffsynth import package
from tworeel.diffsynth.__main__ import main
from tworeel.diffsynth.launching import launcher, prepare
from tworeel.diffsynth.settings import read_settings
from tworeel.errors import UserError

TWO = {"DIFFSYNTH_DUAL_GPU": "true", "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu"}


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(package, "version", version)
    monkeypatch.setattr("tworeel.diffsynth.launching.mend_mistral", lambda: None)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("variables")
def test_problems_are_lines_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, None)
    monkeypatch.setenv("DIFFSYNTH_DUAL_GPU_SPLIT_AT", "twenty")
    (tmp_path / "train.py").write_text("raise AssertionError", encoding="utf-8")
    assert main([str(tmp_path / "train.py")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "DiffSynth is not installed: pip install diffsynth==" in lines[0] and "'twenty'" in lines[1]


def test_a_script_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.py"]) == 2
    assert "there is no script 'nowhere.py'" in capsys.readouterr().err


def test_unless_the_variable_is_true_the_script_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, None)  # nothing is asked of it
    script = tmp_path / "train.py"
    script.write_text("import sys, beside; print(__name__, sys.argv[1:], beside.here)", encoding="utf-8")
    (tmp_path / "beside.py").write_text("here = 'found'", encoding="utf-8")
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    monkeypatch.setattr("sys.argv", ["python"])
    for value in ("", "false", "1"):
        monkeypatch.setenv("DIFFSYNTH_DUAL_GPU", value)
        assert main([str(script), "--task", "sft"]) == 0
        assert capsys.readouterr().out == "__main__ ['--task', 'sft'] found\n"


def test_a_device_that_runs_out_of_memory_is_a_line_with_what_needs_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def split(*_: object, **_named: object) -> None:
        raise torch.OutOfMemoryError("CUDA was full.\nMore")

    monkeypatch.setattr("tworeel.diffsynth.launching._check_accelerator", lambda *_: None)
    monkeypatch.setattr("tworeel.diffsynth.launching.split_pipeline", split)
    launch = launcher(lambda *_: None, read_settings(TWO))
    with pytest.raises(UserError) as raised:
        launch(None, None, SimpleNamespace(pipe=None), None)
    (line,) = raised.value.problems
    assert line.startswith("out of memory: CUDA was full. What needs less: DIFFSYNTH_DUAL_GPU_RESIDENCY=")


@pytest.mark.parametrize("found", ["2.1.11", "2.2.0", "3.0.0", "1.1.9"])
def test_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(UserError, match=rf"DiffSynth {found} is installed, this was tested with 2\.1\.12"):
        prepare([], TWO)


def test_tasks_and_options_that_a_split_does_not_go_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.1.12")
    with pytest.raises(UserError) as raised:
        prepare(["--task=direct_distill", "--enable_model_cpu_offload"], TWO)
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "--task direct_distill",
        "--enable_model_cpu_offload",
    ]


def test_where_nothing_is_trained_the_script_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.1.12")
    monkeypatch.setattr("tworeel.diffsynth.launching.replace_launcher", lambda _: pytest.fail("replaced"))
    args = ["--task", "sft:data_process"]
    assert prepare(args, TWO) == args


def test_the_models_are_loaded_to_host_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.1.12")
    monkeypatch.setattr("tworeel.diffsynth.launching.replace_launcher", lambda _: None)
    for args in (["--task", "sft"], ["--task", "sft", "--initialize_model_on_cpu"]):
        assert prepare(args, TWO) == ["--task", "sft", "--initialize_model_on_cpu"]
