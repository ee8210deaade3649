"""Runs the benchmarks' scripts in processes of their own, which have imported torch before they begin.

Each script on its own would take four seconds for its imports. A fork server imports once; where there is no
fork, each process imports for itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"
# There is one fork server, which imports these when its first process is started: see tests/training.
_PRELOADED = ["pytest", "pytest.__main__", "tworeel.training.run"]


def run(script: str, *arguments: str | Path, backend: str | None = None) -> str:
    """Run a benchmark at toy size, as it is run by hand, and return what it printed.

    Args:
        script, arguments: as on the command line.
        backend: what compiles blocks; none but the default one makes kernels, which takes most of the time.
    """
    is_fast = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if is_fast else "spawn")
    if is_fast:
        context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        printed, told = Path(folder, "printed"), Path(folder, "told")
        words = [str(BENCH / script), "--tiny", *map(str, arguments)]
        process = context.Process(target=_run, args=(words, printed, told, backend))
        process.start()
        process.join(250)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == 0, told.read_text(encoding="utf-8")
        return printed.read_text(encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _run(words: list[str], printed: Path, told: Path, backend: str | None) -> None:
    """In the process: as `python bench/script.py ...`, with its output in files."""
    for name, path in (("stdout", printed), ("stderr", told)):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (open as long as the process runs)
        os.dup2(file.fileno(), getattr(sys, f"__{name}__").fileno())
        setattr(sys, name, file)
    if backend is not None:
        from tworeel.engine import compiling  # only in the process

        compiling.BACKEND = backend
    sys.argv = words
    sys.path.insert(0, str(BENCH))
    runpy.run_path(words[0], run_name="__main__")
