from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tworeel import __version__

COMMANDS = ("train", "check", "cache", "sample", "convert", "demo", "bench", "config")
Run = Callable[..., Any]


def tworeel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tworeel", *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        check=False,
    )


def test_the_help_shows_the_three_steps_and_all_commands(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = tworeel("--help", cwd=tmp_path)
    assert time.perf_counter() - start < 10  # torch is not imported: a second on an idle machine
    assert done.returncode == 0
    assert "1. Put clips" in done.stdout and "3. tworeel train" in done.stdout
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_a_sentence_for_each_option(tmp_path: Path, command: str) -> None:
    done = tworeel(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"tworeel {command}" in done.stdout


def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom tworeel.cli.app import app\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'av'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_option_or_command_exits_with_2(tmp_path: Path) -> None:
    for arguments in (["train", "--no-such-option"], ["no-such-command"]):
        done = tworeel(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "No such" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_path_is_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = tworeel("check", "no-such-file.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no-such-file.toml: no such file\n"


def test_the_version_is_shown(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"tworeel {__version__}\n")
