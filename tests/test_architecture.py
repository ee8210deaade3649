"""The rooms of the package, and that arrows between them point down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tworeel"
ROOMS = (
    "cli",
    "diffsynth",
    "benchmarks",
    "demo",
    "training",
    "sampling",
    "planning",
    "report",
    "cache",
    "data",
    "lora",
    "models",
    "weights",
    "quant",
    "engine",
    "config",
)
"""From the top down; `docs/how-a-step-flows.md` has them in this order."""
SHARED = {
    "tworeel.errors",
    "tworeel.files",
    "tworeel.host_memory",
    "tworeel.signals",
    "tworeel.units",
    "tworeel.workers",
    "tworeel.__version__",
}
"""Belong to no room; all but engine and quant may use them, and they use nothing of ours but each other."""

FILES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = {path.name for path in (PACKAGE / "models").iterdir() if (path / "family.py").is_file()}
MAY_NAME_A_FAMILY = {"models/registry.py"}
"""The list of families."""


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    """Yield each name of ours that a file imports, also in functions; not those for annotations only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("tworeel"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} has a relative import"
            if node.module and node.module.split(".")[0] == "tworeel":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """`tworeel.data.scan.scan` -> `data`; None for what belongs to no room."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in ROOMS else None


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=relative)
def test_a_file_imports_only_its_room_and_rooms_below(path: Path) -> None:
    here = relative(path).split("/")[0]
    assert here in ROOMS, f"{here}/ is a room without a place in ROOMS"
    allowed = {*ROOMS[ROOMS.index(here) :]}
    upward = [name for name in imports_of(path) if room_of(name) not in allowed and not is_shared(name)]
    assert not upward, f"{relative(path)} imports {', '.join(upward)}"


def is_shared(name: str) -> bool:
    return any(name == shared or name.startswith(f"{shared}.") for shared in SHARED)


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=relative)
def test_the_engine_knows_nothing_of_ours(path: Path) -> None:
    assert all(room_of(name) == "engine" for name in imports_of(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "quant").glob("*.py")), ids=relative)
def test_the_quantized_layers_know_nothing_of_ours(path: Path) -> None:
    assert all(room_of(name) == "quant" for name in imports_of(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffsynth").glob("*.py")), ids=relative)
def test_diffsynths_training_needs_the_engine_and_the_planner_alone(path: Path) -> None:
    rooms = {room_of(name) for name in imports_of(path)} - {None}
    assert rooms <= {"diffsynth", "engine", "quant", "planning"}


@pytest.mark.parametrize("name", ["errors", "files", "host_memory", "signals", "workers"])
def test_what_belongs_to_no_room_uses_no_room(name: str) -> None:
    assert all(is_shared(imported) for imported in imports_of(PACKAGE / f"{name}.py"))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_family_is_named_only_in_its_folder_the_registry_the_demo_and_the_benchmarks(path: Path) -> None:
    place = relative(path)
    folders = ("demo/", "benchmarks/", *(f"models/{name}/" for name in FAMILIES))
    if place.startswith(folders) or place in MAY_NAME_A_FAMILY:
        return
    assert not set(names_in(path)) & FAMILIES


def names_in(path: Path) -> Iterator[str]:
    """Yield the words of identifiers, imports and keys; texts for people may name a family as an example."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(word)) | ast.Name(id=word) | ast.Attribute(attr=word):
                yield from re.split(r"[._]|\d", word.lower())
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word) | ast.arg(arg=word):
                yield from re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower())
            case ast.Constant(value=str(word)) if re.fullmatch(r"[\w.-]+", word):
                yield from re.split(r"[._-]|\d", word.lower())


def test_the_documents_show_the_rooms_in_this_order() -> None:
    text = (PACKAGE.parents[1] / "docs" / "how-a-step-flows.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE)) == ROOMS


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in FILES}
    assert all((folder / "__init__.py").is_file() for folder in folders)
