from __future__ import annotations

import threading

import pytest

from tworeel.engine.schedule import Action, one_f_one_b
from tworeel.engine.turnstile import Aborted, Turnstile


def test_threads_get_their_turns_in_the_order_of_the_schedule():
    order = one_f_one_b(1, 8)[0]
    turnstile, seen = Turnstile([order]), []

    def take(action: Action) -> None:
        turnstile.enter(action)
        seen.append(action)
        turnstile.leave(action)

    threads = [threading.Thread(target=take, args=(action,)) for action in reversed(order)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == order


def test_an_abort_wakes_those_who_wait_and_keeps_the_first_error():
    turnstile = Turnstile(one_f_one_b(1, 2))
    woken = []

    def wait() -> None:
        try:
            turnstile.enter(Action("F", 1, 0))
        except Aborted as aborted:
            woken.append(aborted.__cause__)

    thread = threading.Thread(target=wait)
    thread.start()
    first = RuntimeError("first")
    turnstile.abort(first)
    turnstile.abort(RuntimeError("second"))
    thread.join(10)
    assert woken == [first]
    assert turnstile.error is first
    with pytest.raises(Aborted):
        turnstile.enter(Action("F", 0, 0))
