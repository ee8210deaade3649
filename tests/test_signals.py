"""Signals that reach a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tworeel.signals import StopFlag, Stopped

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send these to one process")

POLLING = """
    import sys, time
    from tworeel.signals import StopFlag, Stopped
    try:
        with StopFlag() as flag:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
                flag.check()
    except Stopped as stopped:
        print("saved", flush=True)
        sys.exit(stopped.exit_code)
"""
BUSY = """
    import ctypes
    from tworeel.signals import StopFlag
    with StopFlag() as flag:
        print("ready", flush=True)
        libc = ctypes.CDLL(None)  # one call of a library; it starts over when a signal interrupts it
        while not libc.poll(None, 0, 60_000) == 0:
            pass
"""
DEAF = """
    import time
    from tworeel.signals import StopFlag
    with StopFlag() as flag:
        print("ready", flush=True)
        while True:
            time.sleep(60)
"""


def start(program: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@posix_only
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_loop_save_and_sets_the_exit_code(signum: int, code: int) -> None:
    child = start(POLLING)
    child.send_signal(signum)
    out, err = child.communicate(timeout=20)
    assert (out, child.returncode) == ("saved\n", code)
    assert err.count("\n") == 2 and "second one stops at once" in err


@posix_only
@pytest.mark.parametrize("program", [DEAF, BUSY])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_exits_at_once_even_inside_a_library(program: str, signum: int, code: int) -> None:
    child = start(program)
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    assert child.stderr.readline() == "\n" and "SIGINT" in child.stderr.readline()
    assert child.poll() is None
    child.send_signal(signum)
    started = time.monotonic()
    _, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert time.monotonic() - started < 2
    assert "nothing more is saved" in err


@posix_only
def test_signals_of_a_forked_child_are_not_counted_as_ours() -> None:
    with StopFlag() as flag:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            os._exit(7 if flag.is_set else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.05)
        assert not flag.is_set


def test_handlers_and_the_thread_are_gone_afterwards() -> None:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGTERM)
        assert flag.is_set
        with pytest.raises(Stopped) as caught:
            flag.check()
    assert caught.value.exit_code == 143
    assert {signum: signal.getsignal(signum) for signum in before} == before
    assert "signals" not in {thread.name for thread in threading.enumerate()}
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[bool] = []

    def work() -> None:
        with StopFlag() as flag:
            flag.check()
            seen.append(flag.is_set or signal.getsignal(signal.SIGTERM) is not before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
