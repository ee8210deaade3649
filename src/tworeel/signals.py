"""Ctrl-C and SIGTERM: the first asks every loop to stop where nothing is lost, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import NoReturn, Self


class Stopped(BaseException):
    """A signal asked to stop. Like `KeyboardInterrupt` it is no `Exception`, so that no retry catches it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopFlag:
    """A flag that SIGINT, SIGTERM (and Ctrl-Break on Windows) set; long loops poll `check`.

    ```python
    with StopFlag() as flag:
        for item in items:
            work(item)
            flag.check()  # raises Stopped
    ```

    A second signal ends the process at once with 128 + its number. A thread of its own counts the signals,
    since Python's handlers wait for as long as the main thread is inside one call of a library. Outside
    the main thread no handler can be installed, and the flag stays unset. Flags do not nest.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._undo = contextlib.ExitStack()

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._signum is not None

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self._signum is not None:
            raise Stopped(self._signum)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._watch()
            for signum in stop_signals():
                self._undo.callback(signal.signal, signum, signal.signal(signum, self._on_signal))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._signum = signum

    def _watch(self) -> None:
        """Start the thread that hears of a signal at the moment it comes."""
        hearing, telling = socket.socketpair()
        telling.setblocking(False)
        thread = threading.Thread(target=self._count, args=(hearing,), name="signals", daemon=True)
        thread.start()
        # Undone from the last to the first: a closed end makes the thread return
        self._undo.callback(hearing.close)
        self._undo.callback(thread.join)
        self._undo.callback(telling.close)
        self._undo.callback(signal.set_wakeup_fd, _tell(telling))

    def _count(self, hearing: socket.socket) -> None:
        count = 0
        while numbers := hearing.recv(64):
            for signum in (number for number in numbers if number in stop_signals()):
                count += 1
                if count > 1:
                    _exit_at_once(signum)
                self._on_signal(signum, None)
                _say(f"{_name(signum)}: stopping at the next safe point; a second one stops at once")


def stop_signals() -> tuple[int, ...]:
    """Return the signals that ask to stop on this system."""
    if sys.platform == "win32":
        return signal.SIGINT, signal.SIGTERM, signal.SIGBREAK
    return signal.SIGINT, signal.SIGTERM


def _tell(telling: socket.socket) -> int:
    """Have Python write the number of each signal to `telling`; return what it wrote to before."""
    if hasattr(os, "register_at_fork"):
        # A Ctrl-C reaches forked children too, and they would tell this process a second time
        os.register_at_fork(after_in_child=lambda: _stop_telling(telling))
    return signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)


def _stop_telling(telling: socket.socket) -> None:
    if telling.fileno() >= 0:
        signal.set_wakeup_fd(-1)


def _exit_at_once(signum: int) -> NoReturn:
    _say(f"second signal ({_name(signum)}): stopped at once, nothing more is saved")
    os._exit(128 + signum)


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def _say(line: str) -> None:
    """Write one line to the terminal past all buffers and locks, which the main thread may hold."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())
