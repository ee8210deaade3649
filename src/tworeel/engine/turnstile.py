"""Lets each micro-batch's thread work on a stage only when the schedule says that it is its turn."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tworeel.engine.schedule import Action, Order


class Aborted(Exception):
    """Another micro-batch failed; this one ends here."""


class Turnstile:
    """The schedule's order in queues; a stage's actions are all in one. Threads wait for their turn.

    An error in one thread ends all of them: `abort` wakes every waiter with `Aborted`.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self._orders = orders
        self._queue_of = {action.stage: queue for queue, order in enumerate(orders) for action in order}
        self._position = [0] * len(orders)
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """The first error that was given to `abort`."""
        return self._error

    def enter(self, action: Action) -> None:
        """Block until it is `action`'s turn in its stage's queue.

        Raises:
            Aborted: another thread failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._next(action.stage) == action)
            if self._error is not None:
                raise Aborted from self._error

    def after(self, action: Action) -> Action | None:
        """What comes after `action`, whose turn it is now, in its stage's queue."""
        return self._at(queue := self._queue_of[action.stage], self._position[queue] + 1)

    def leave(self, action: Action) -> None:
        """Give the turn to the next action in the queue."""
        with self._changed:
            assert self._next(action.stage) == action or self._error, f"{action} left out of turn"
            self._position[self._queue_of[action.stage]] += 1
            self._changed.notify_all()

    def abort(self, error: BaseException) -> None:
        """End all threads; the first error is kept."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self, stage: int) -> Action | None:
        return self._at(queue := self._queue_of[stage], self._position[queue])

    def _at(self, queue: int, position: int) -> Action | None:
        order = self._orders[queue]
        return order[position] if position < len(order) else None
