from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tworeel.cli.importing import importing


@pytest.fixture(autouse=True)
def nothing_stays_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_no_garbage_is_looked_for_while_something_is_imported() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_is_looked_for_again_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        import tworeel.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_what_was_imported_is_not_looked_through_again() -> None:
    with importing():
        imported = {"a module's": "dictionary", "with": []}
    assert not any(known is imported for known in gc.get_objects())
