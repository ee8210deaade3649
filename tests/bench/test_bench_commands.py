"""The commands that the documents name have the options that the scripts and `tworeel bench` have."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
from bench_scripts import BENCH, run
from typer.main import get_command

from tworeel.cli.app import app

DOCUMENTS = (BENCH / "README.md", *sorted((BENCH.parent / "docs").glob("*.md")))


def options_by_command() -> dict[str, set[str]]:
    """Options that a document gives to each `bench/….py` and to `tworeel bench`, by the command's name."""
    found = defaultdict(set)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"(bench/\w+\.py|tworeel bench)([^`|\n#]*)", text):
            found[name].update(re.findall(r"--[a-z][a-z-]*", rest))
    return found


OPTIONS = options_by_command()
SCRIPTS = sorted(name.removeprefix("bench/") for name in OPTIONS if name.endswith(".py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_options_that_documents_give_it(script: str) -> None:
    known = set(re.findall(r"--[a-z][a-z-]*", run(script, "--help")))
    assert OPTIONS[f"bench/{script}"] <= known


def test_bench_has_the_options_that_documents_give_it() -> None:
    command = get_command(app).commands["bench"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert len(OPTIONS["tworeel bench"]) > 10
    assert OPTIONS["tworeel bench"] <= {*known, "--help"}
