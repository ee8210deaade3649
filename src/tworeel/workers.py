"""Work through a list of jobs with several threads, while the main thread shows progress and may stop it."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

POLL_SECONDS = 0.1

T = TypeVar("T")
R = TypeVar("R")


class Observer(Protocol):
    """Sees the progress of long work; called in the thread that started the work.

    `advance` and `poll` may raise to stop: threads end after their current item, and what is done stays.
    """

    def start(self, title: str, total: int) -> None:
        """A phase of `total` items begins."""

    def advance(self) -> None:
        """One more item is done."""

    def poll(self) -> None:
        """Called several times a second, also while no item gets done."""

    def finish(self) -> None:
        """The phase is over, done or not."""


class SilentObserver:
    """Shows nothing and never stops."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None: ...


class SharedJobs(Iterator[T]):
    """Jobs that several threads take from; after `stop` there are none left."""

    def __init__(self, jobs: Iterable[T]) -> None:
        self._waiting = deque(jobs)
        self.stopped = False

    def __next__(self) -> T:
        try:
            return self._waiting.popleft()
        except IndexError:
            raise StopIteration from None

    def stop(self) -> None:
        self.stopped = True
        self._waiting.clear()


Worker = Callable[[SharedJobs[T]], Iterator[R]]
"""Takes jobs until there are none left and yields a result for each; runs in a thread of its own."""


def run_workers(
    title: str, jobs: Sequence[T], workers: Sequence[Worker[T, R]], observer: Observer
) -> list[R]:
    """Let the workers share the jobs; return their results in the order in which they were done.

    Raises:
        Whatever a worker or the observer raises first; the others end after their current item, and no
        thread is left.
    """
    shared = SharedJobs(jobs)
    outbox: queue.Queue[tuple[R] | Future[None]] = queue.Queue()
    observer.start(title, len(jobs))
    try:
        with ThreadPoolExecutor(len(workers), thread_name_prefix=title) as pool:
            try:
                for worker in workers:
                    pool.submit(_drain, worker, shared, outbox).add_done_callback(outbox.put)
                return _watch(len(workers), outbox, observer)
            finally:
                shared.stop()
    finally:
        observer.finish()


def run_each(
    title: str, function: Callable[[T], R], items: Sequence[T], threads: int, observer: Observer
) -> dict[T, R]:
    """Return `function(item)` for each item, computed by that many threads."""

    def work(jobs: SharedJobs[T]) -> Iterator[tuple[T, R]]:
        for item in jobs:
            yield item, function(item)

    if not items:
        return {}
    return dict(run_workers(title, items, [work] * min(threads, len(items)), observer))


def run_ahead(
    function: Callable[[T], R], jobs: SharedJobs[T], depth: int
) -> Generator[tuple[T, R], None, None]:
    """Yield each job with `function(job)`, of which up to `depth` are computed ahead, in other threads."""
    ready: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(depth) as pool:
        while not jobs.stopped:
            while len(ready) < depth and (job := next(jobs, None)) is not None:
                ready.append((job, pool.submit(function, job)))
            if not ready:
                return
            job, future = ready.popleft()
            yield job, future.result()


def _drain(worker: Worker[T, R], jobs: SharedJobs[T], outbox: queue.Queue[Any]) -> None:
    for result in worker(jobs):
        outbox.put((result,))


def _watch(running: int, outbox: queue.Queue[tuple[R] | Future[None]], observer: Observer) -> list[R]:
    results: list[R] = []
    while running:
        observer.poll()
        try:
            message = outbox.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if isinstance(message, Future):
            message.result()  # raises what the worker raised
            running -= 1
        else:
            results.extend(message)
            observer.advance()
    return results
