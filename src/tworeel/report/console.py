"""The console that everything is written to, and what libraries may say on it."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

from rich.console import Console

console = Console(highlight=False)
"""Standard output: progress, tables, results."""
error_console = Console(stderr=True, highlight=False)
"""Standard error: warnings and errors."""

_STYLES = {"error": "bold red", "warning": "yellow"}


def say(line: str) -> None:
    """Write a line as it is: no markup, and not broken at the console's width."""
    console.print(line, markup=False, soft_wrap=True)


def complain(kind: str, line: str) -> None:
    """Write one line to standard error, for example `error: no such file`."""
    style = _STYLES.get(kind, "default")
    error_console.print(f"[{style}]{kind}:[/]", end=" ")
    error_console.print(" ".join(line.splitlines()), markup=False, soft_wrap=True)


def set_up_console() -> None:
    """Make output safe on any console, show each warning once and quiet the libraries.

    Call it before torch, transformers and diffusers are imported: they read their settings then.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that the console's encoding lacks must not end the run.
            stream.reconfigure(errors="backslashreplace")
    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    _set_up_logging()


def _set_up_logging() -> None:
    handler = _ConsoleHandler(logging.INFO)
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("tworeel").setLevel(logging.INFO)
    # Where the extra `eightbit` is installed, diffusers imports it, and it warns of kernels that nobody needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    warnings.simplefilter("once")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


class _Once(logging.Filter):
    """Lets each warning through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = record.levelno != logging.WARNING or message not in self._seen
        self._seen.add(message)
        return is_new


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.levelname.lower(), self.format(record))
