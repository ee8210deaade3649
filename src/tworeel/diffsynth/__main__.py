"""Run a training script of DiffSynth: `python -m tworeel.diffsynth SCRIPT ARGS...`."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tworeel.errors import UserError

_USAGE = (
    "usage: python -m tworeel.diffsynth SCRIPT ARGS...   (DIFFSYNTH_DUAL_GPU=true splits the transformer)"
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)  # noqa: T201
        return 0 if words else 2
    try:
        script, args, launcher = Path(words[0]), words[1:], None
        if not script.is_file():
            raise UserError(f"there is no script '{script}'")
        if os.environ.get("DIFFSYNTH_DUAL_GPU", "").strip().lower() == "true":
            # Imported here: without the variable nothing of ours is loaded.
            from tworeel.diffsynth.launching import prepare

            args, launcher = prepare(args, os.environ)
        _run(script, args)
        if launcher is not None and not launcher.called:
            said = f"{script} has not called DiffSynth's launch_training_task: nothing was split"
            print(f"warning: {said}", file=sys.stderr)  # noqa: T201
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _run(script: Path, args: Sequence[str]) -> None:
    """As `python SCRIPT ARGS...` would."""
    sys.argv = [str(script), *args]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
