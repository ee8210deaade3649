"""The reference of all options, made from the schema.

Write it with `python -m tworeel.config.reference > docs/config.md`.
"""

from __future__ import annotations

import sys

from tworeel.config.fields import Option, section_doc, sections
from tworeel.config.writing import toml_value

_INTRODUCTION = """\
# Configuration

A run is described by one TOML file; `tworeel config` writes one with every option and its default.
Only `model.path` and one dataset must be given. Unknown keys and wrong types are errors.
On the command line, `--set section.option=value` overrules the file.
Relative paths start at the folder of the TOML file, those on the command line at the current folder.
Where `"none"` is allowed, it stands for "not set".
"""


def reference() -> str:
    """Return the whole reference as Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(name, options) for name, options in sections().items())])


def _section(name: str, options: tuple[Option, ...]) -> str:
    title = f"[[{name}]]" if "." in name else f"[{name}]"
    rows = [
        f"| `{option.name}` | {option.allowed} | {_default(option)} | {option.doc} |" for option in options
    ]
    head = ["| option | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## `{title}`", "", section_doc(name), "", *head, *rows, ""])


def _default(option: Option) -> str:
    if option.required:
        return "required"
    return "not set" if option.default is None else f"`{toml_value(option.default)}`"


if __name__ == "__main__":
    sys.stdout.buffer.write(reference().encode())
