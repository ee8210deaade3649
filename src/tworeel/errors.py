"""What a user did wrong, in words that they can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a value.

    Each problem is one line that names the file or key, the value and what is allowed. The command line
    prints the lines and exits with code 2; no traceback is shown.
    """

    def __init__(self, *problems: str) -> None:
        assert problems, "an error without a problem"
        self.problems = problems
        super().__init__("\n".join(problems))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `UserError` that lists all problems, if there are any."""
    found = tuple(problems)
    if found:
        raise UserError(*found)


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the problems of a `UserError` inside to `problems` and go on, so that all come at once."""
    try:
        yield
    except UserError as error:
        problems.extend(error.problems)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
