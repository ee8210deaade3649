"""What is left of the host's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tworeel import host_memory
from tworeel.host_memory import available_memory
from tworeel.units import GIB

VERSIONS = {
    "2": ("memory.max", "memory.current", "memory.stat", ""),
    "1": (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_",
    ),
}


def contain(folder: Path, version: str, limit: str) -> None:
    """A container with 3 MiB in use, 1 MiB of them cached files."""
    names = VERSIONS[version]
    half = f"{names[3]}inactive_file {2**19}\n{names[3]}active_file {2**19}\nsock 0"
    for name, text in zip(names, (limit, str(3 * 2**20), half), strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    contain(tmp_path, version, str(8 * 2**20))
    assert available_memory() == 6 * 2**20
    contain(tmp_path, version, str(2**20))
    assert available_memory() == 0


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_without_a_limit_it_is_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    assert available_memory() == pytest.approx(psutil.virtual_memory().available, abs=GIB)
    contain(tmp_path, "2", limit)
    assert available_memory() == pytest.approx(psutil.virtual_memory().available, abs=GIB)
