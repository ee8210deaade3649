"""The folder of a run and its lock, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tworeel.errors import UserError
from tworeel.training.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from tworeel.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def hold(run: RunFolder) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_locking_makes_the_folder_and_leaves_no_trace_of_the_process(run: RunFolder) -> None:
    with run.locked():
        assert int(run.pid.read_text()) == os.getpid()
    assert not run.pid.exists()
    with run.locked():
        pass


def test_a_second_process_is_refused_and_told_which_one_writes(run: RunFolder) -> None:
    child = hold(run)
    with (
        pytest.raises(UserError, match=rf"another run is writing to .*run \(process {child.pid}\)"),
        run.locked(),
    ):
        pass
    child.communicate("\n", timeout=20)
    with run.locked():
        pass


def test_two_runs_of_one_process_exclude_each_other(run: RunFolder) -> None:
    with (
        run.locked(),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        RunFolder(run.path).locked(),
    ):
        pass


def test_the_lock_of_a_killed_process_does_not_block(run: RunFolder) -> None:
    child = hold(run)
    child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    child.communicate(timeout=20)
    assert int(run.pid.read_text()) == child.pid
    with run.locked():
        assert int(run.pid.read_text()) == os.getpid()


def test_the_lock_is_free_after_an_error(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), run.locked():
        _ = 1 / 0
    with run.locked():
        pass


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_in_the_way_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; a run needs a folder"):
        RunFolder(tmp_path / "file" / inside).create()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where even root cannot write")
@pytest.mark.parametrize("path", ["/proc/self", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused(path: str) -> None:
    with (
        pytest.raises(UserError, match=f"{path}: cannot write a run there: "),
        RunFolder(Path(path)).locked(),
    ):
        pass


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/a", "a\\b"])
def test_the_lora_stays_in_the_folder(run: RunFolder, name: str) -> None:
    with pytest.raises(UserError, match=r"train\.name = "):
        run.lora(name)
    assert run.lora("cat v1.5") == run.path / "cat v1.5.safetensors"


def test_a_name_that_no_file_system_takes_is_refused(run: RunFolder) -> None:
    assert run.lora("é" * 100).name == "é" * 100 + ".safetensors"
    with pytest.raises(UserError, match="must be of 200 bytes at most"):
        run.lora("é" * 101)
