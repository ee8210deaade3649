"""Runs in processes of their own, for the tests to kill and to signal.

The fork server imports everything once; a process is then there in no time. Where there is no fork, each
process imports for itself.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

from tworeel.config.schema import RunConfig
from tworeel.signals import StopFlag, Stopped
from tworeel.training.report import SilentRun
from tworeel.training.run import train

# There is one fork server, which imports these when the first process is started.
_PRELOADED = ["pytest", "pytest.__main__", "tworeel.training.run"]


def process_context() -> tuple[Any, bool]:
    """How processes are started, and whether that is fast."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn"), False
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context, True


class Polling(SilentRun):
    """Stops a run when a signal has come."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag

    def poll(self) -> None:
        self._flag.check()


def go_on(config: RunConfig, ready: Event) -> None:
    """Train, or resume; exits with the signal's code if one comes."""
    with StopFlag() as flag:
        ready.set()
        try:
            train(config, resume=True, observer=Polling(flag))
        except Stopped as stopped:
            sys.exit(stopped.exit_code)


def start(context: Any, config: RunConfig) -> BaseProcess:
    """Start `go_on` in a process and return once it listens to signals."""
    ready = context.Event()
    process: BaseProcess = context.Process(target=go_on, args=(config, ready))
    process.start()
    assert ready.wait(120)
    return process
