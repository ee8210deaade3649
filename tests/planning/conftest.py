"""Each block is traced once: a trace depends on nothing but the model, the clip and the settings."""

from __future__ import annotations

from typing import Any

import pytest

from tworeel.planning import planner

_TRACES: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = planner.trace_model

    def known(family: Any, source: Any, bucket: Any, settings: Any) -> Any:
        key = (source.traits.variant, bucket, settings)
        if key not in _TRACES:
            _TRACES[key] = trace(family, source, bucket, settings)
        return _TRACES[key]

    monkeypatch.setattr(planner, "trace_model", known)
