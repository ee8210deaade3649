"""What is refused before a script runs; most of it needs no DiffSynth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from torch import nn

from tworeel.diffsynth import package
from tworeel.diffsynth.__main__ import main
from tworeel.diffsynth.launching import SplitLauncher, prepare
from tworeel.diffsynth.settings import read_settings
from tworeel.errors import UserError

TWO = {
    "DIFFSYNTH_DUAL_GPU": "true",
    "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu",
    "ACCELERATE_USE_CPU": "true",
}


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Launches a module whose models must not be reached."""

    def launch(state: Any, **options: Any) -> None:
        named = {"args": SimpleNamespace(**{**OPTIONS, **options})}
        model = SimpleNamespace(pipe=nn.Module())
        SplitLauncher(read_settings(TWO)).in_place_of(lambda *_: None)(state, None, model, None, **named)

    return launch


OPTIONS = {"task": "sft", "enable_model_cpu_offload": False}


def state(**changes: Any) -> Any:
    """What of an `Accelerator` is looked at."""
    usual = {"distributed_type": DistributedType.NO, "num_processes": 1, "scaler": None}
    usual |= {"device": torch.device("cpu"), "gradient_accumulation_steps": 2}
    return SimpleNamespace(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distributed_type": DistributedType.MULTI_GPU, "num_processes": 2}, "MULTI_GPU with 2 processes"),
        ({"distributed_type": DistributedType.MULTI_GPU}, "MULTI_GPU with 1 processes"),
        ({"scaler": object()}, "--mixed_precision fp16: its scaled losses cannot overlap"),
        ({"device": torch.device("cuda")}, "accelerate computes on cuda:0, so that has to be the first"),
    ],
)
def test_what_a_script_has_made_of_accelerate_is_checked_before_its_models_are_split(
    launched: Callable[..., None], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        launched(state(**changes))


def test_one_micro_batch_a_step_may_have_scaled_losses(launched: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="no transformer was loaded: name its files in --model_paths"):
        launched(state(scaler=object(), gradient_accumulation_steps=1))


def test_options_that_the_script_has_set_itself_are_refused_too(launched: Callable[..., None]) -> None:
    with pytest.raises(UserError) as raised:
        launched(state(), task="direct_distill", enable_model_cpu_offload=True)
    assert len(raised.value.problems) == 2


def test_a_device_that_runs_out_of_memory_is_a_line_with_what_needs_less(
    monkeypatch: pytest.MonkeyPatch, launched: Callable[..., None]
) -> None:
    def split(*_: object, **_named: object) -> None:
        raise torch.OutOfMemoryError("CUDA was full.\nMore")

    monkeypatch.setattr("tworeel.diffsynth.launching.split_pipeline", split)
    with pytest.raises(UserError) as raised:
        launched(state())
    (line,) = raised.value.problems
    assert line.startswith("out of memory: CUDA was full. What needs less: DIFFSYNTH_DUAL_GPU_RESIDENCY=")


@pytest.mark.parametrize("found", ["2.1.11", "2.2.0", "3.0.0", "1.1.9"])
def test_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(UserError, match=rf"DiffSynth {found} is installed, this was tested with 2\.1\.12"):
        prepare([], TWO)


def test_tasks_and_options_that_a_split_does_not_go_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.1.12")
    args = ["--task=sft", "--task", "direct_distill", "--enable_model", "--enable_lora_hot_loading"]
    args += ["--gradient_acc", "2"]
    with pytest.raises(UserError) as raised:
        prepare(args, TWO | {"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "--task direct_distill",
        "--enable_model_cpu_offload",
        "--enable_lora_hot_loading",
        "--mixed_precision fp16",
    ]


@pytest.mark.parametrize("args", [["--task"], ["--gradient_accumulation_steps", "two"]])
def test_an_option_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    pretend(monkeypatch, "2.1.12")
    with pytest.raises(UserError, match=f"argument {args[0]}: "):
        prepare(args, TWO)


@pytest.mark.parametrize("task", ["sft:data_process", "direct_distill:data_process"])
def test_where_nothing_is_trained_the_script_is_left_alone_and_nothing_refused(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    pretend(monkeypatch, "2.1.12")
    monkeypatch.setattr("tworeel.diffsynth.launching.replace_launcher", lambda _: pytest.fail("replaced"))
    args = ["--task", "sft", "--task", task, "--enable_model_cpu_offload"]
    one = {"DIFFSYNTH_DUAL_GPU": "true", "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu", "WORLD_SIZE": "2"}
    assert prepare(args, one) == (args, None)


def test_the_models_are_loaded_to_host_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.1.12")
    monkeypatch.setattr("tworeel.diffsynth.launching.replace_launcher", lambda _: None)
    for args in (["--task", "sft"], ["--task", "sft", "--initialize_model_on_cpu"]):
        assert prepare(args, TWO)[0] == ["--task", "sft", "--initialize_model_on_cpu"]


@pytest.mark.usefixtures("variables")
def test_a_script_that_uses_another_launcher_is_told_that_nothing_was_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "2.1.12")
    monkeypatch.setattr("tworeel.diffsynth.launching.replace_launcher", lambda _: None)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", ["python"])
    script = tmp_path / "train.py"
    script.write_text("print('trained')", encoding="utf-8")
    for args, said in ((["--task", "sft"], True), (["--task", "sft:data_process"], False)):
        assert main([str(script), *args]) == 0
        out, err = capsys.readouterr()
        assert out == "trained\n" and ("nothing was split" in err) is said
