from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tworeel.workers import SharedJobs, SilentObserver, run_ahead, run_each, run_workers


class Stop(BaseException):
    """As `tworeel.signals.Stopped`: no `Exception`."""


class Recorder:
    def __init__(self, stop_after: int | None = None, stop_at_poll: int | None = None) -> None:
        self.calls: list[str] = []
        self._stop_after, self._stop_at_poll = stop_after, stop_at_poll

    def start(self, title: str, total: int) -> None:
        self.calls.append(f"{title} {total}")

    def advance(self) -> None:
        self._call("advance", self._stop_after)

    def poll(self) -> None:
        self._call("poll", self._stop_at_poll)

    def finish(self) -> None:
        self.calls.append("finish")

    def _call(self, name: str, stop: int | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.calls.append(name)
        if stop == self.calls.count(name):
            raise Stop


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_each_job_is_done_once_and_the_observer_sees_it() -> None:
    seen = Recorder()
    assert run_each("Hashing", lambda item: item * item, range(100), 4, seen) == {
        k: k * k for k in range(100)
    }
    assert seen.calls[0] == "Hashing 100"
    assert seen.calls.count("advance") == 100
    assert seen.calls[-1] == "finish"


def test_no_items_start_no_bar() -> None:
    seen = Recorder()
    assert run_each("Hashing", str, [], 4, seen) == {}
    assert seen.calls == []


def test_polls_go_on_while_a_long_job_runs() -> None:
    seen = Recorder()
    run_each("Encoding", lambda item: time.sleep(0.5), [1], 1, seen)
    assert seen.calls.count("poll") >= 3


def test_one_error_stops_the_others_after_their_current_job() -> None:
    done: list[int] = []

    def work(jobs: SharedJobs[int]) -> Iterator[int]:
        for job in jobs:
            if job == 3:
                raise ValueError("job 3")
            time.sleep(0.01)
            done.append(job)
            yield job

    seen = Recorder()
    with pytest.raises(ValueError, match="job 3"):
        run_workers("Encoding", range(1000), [work, work, work], seen)
    assert {0, 1, 2} <= set(done) and len(done) < 100
    assert seen.calls[-1] == "finish"


@pytest.mark.parametrize("stop", [{"stop_after": 3}, {"stop_at_poll": 3}], ids=str)
def test_the_observer_may_stop_the_work(stop: dict[str, int]) -> None:
    done: list[int] = []

    def job(item: int) -> None:
        time.sleep(0.02)
        done.append(item)

    seen = Recorder(**stop)
    with pytest.raises(Stop):
        run_each("Encoding", job, range(1000), 2, seen)
    assert len(done) < 50
    assert seen.calls[-1] == "finish"


def test_what_is_computed_ahead_stays_bounded_and_in_order() -> None:
    started: list[int] = []
    jobs = SharedJobs(range(10))
    for count, (job, result) in enumerate(run_ahead(lambda item: started.append(item) or -item, jobs, 2)):
        assert (job, result) == (count, -count)
        assert len(started) <= count + 2
    assert sorted(started) == list(range(10))


def test_what_was_computed_ahead_is_dropped_after_a_stop() -> None:
    jobs = SharedJobs(range(10))
    results = []
    for job, _ in run_ahead(str, jobs, 2):
        results.append(job)
        if job == 4:
            jobs.stop()
    assert results == [0, 1, 2, 3, 4]


def test_the_silent_observer_is_one() -> None:
    assert run_each("Hashing", str, [1, 2], 2, SilentObserver()) == {1: "1", 2: "2"}
