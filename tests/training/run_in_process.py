"""Runs in processes of their own, for the tests to kill and to signal.

The fork server imports everything once; a process is then there in no time. Where there is no fork, each
process imports for itself.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

from tworeel.config.schema import RunConfig
from tworeel.signals import StopFlag, Stopped
from tworeel.training.report import SilentRun
from tworeel.training.run import train


def process_context() -> BaseContext:
    """How processes are started."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tworeel.training.run", "tworeel.demo.checkpoint", "peft", "torch"])
    return context


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


def start(context: BaseContext, config: RunConfig) -> BaseProcess:
    """Start `go_on` in a process and return once it listens to signals."""
    ready = context.Event()
    process = context.Process(target=go_on, args=(config, ready))  # type: ignore[attr-defined]
    process.start()
    assert ready.wait(120)
    return process
