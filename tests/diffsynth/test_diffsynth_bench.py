"""The comparison of DiffSynth's script with one card, hooks and ours, as it is run by hand, at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("diffsynth_package")


@pytest.mark.slow
def test_every_way_to_run_the_script_is_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE.parents[1] / "bench" / "diffsynth_scripts.py"), "--tiny"]
    command += ["--script", str(HERE / "script.py"), "--folder", str(tmp_path / "bench")]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert len(results) == 5
    for result in results:
        assert result.get("seconds", 0) > 0, result
