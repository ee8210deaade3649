from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import logging, warnings
from tworeel.report.console import complain, say, set_up_console
set_up_console()
for _ in range(3):
    warnings.warn("old thing", DeprecationWarning)
    logging.getLogger("tworeel.data").warning("odd clip")
logging.getLogger("tworeel").info("read")
logging.getLogger("somebody").info("chatter")
say("[bold]" + "x" * 100)
say("\\u65e5\\u672c \\ud800")
complain("error", "a [b]\\nc" + "y" * 100)
"""


def test_lines_stay_whole_and_warnings_come_once_on_any_console() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    out, err = done.stdout.decode("ascii").splitlines(), done.stderr.decode("ascii").splitlines()
    assert out == ["[bold]" + "x" * 100, "\\u65e5\\u672c \\ud800"]
    assert err == ["warning: odd clip", "info: read", "error: a [b] c" + "y" * 100]
