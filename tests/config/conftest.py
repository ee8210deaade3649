from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tworeel.config import RunConfig, load_config
from tworeel.errors import UserError

MINIMAL = '[model]\npath = "wan"\n\n[[data.sources]]\npath = "clips"\n'


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    """Loads the minimal configuration with more TOML behind it and with overrides."""

    def load_text(
        more: str = "", overrides: dict[str, Any] | None = None, *, base: str = MINIMAL
    ) -> RunConfig:
        path = tmp_path / "run.toml"
        path.write_text(base + more, encoding="utf-8")
        return load_config(path, overrides or {})

    return load_text


@pytest.fixture
def problems(load: Callable[..., RunConfig]) -> Callable[..., tuple[str, ...]]:
    """The problems of a configuration that must be refused."""

    def problems_of(more: str = "", overrides: dict[str, Any] | None = None, **rest: Any) -> tuple[str, ...]:
        with pytest.raises(UserError) as caught:
            load(more, overrides, **rest)
        return caught.value.problems

    return problems_of
