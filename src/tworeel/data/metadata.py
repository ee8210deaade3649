"""Dataset files: a folder with captions beside the clips, or a `.csv` or `.jsonl` file.

Columns are `path`, `caption`, `first_image`, `last_image` and those of `tworeel.data.references`, or other
tools' names for them (`COLUMNS`).
Paths are relative to the file that names them, and nothing outside of its folder is read: not by `../`, not
by an absolute path, not through a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from tworeel.data import references
from tworeel.data.errors import BrokenRow
from tworeel.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from tworeel.data.tables import Row, read_rows
from tworeel.errors import did_you_mean

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "video", "image", "file_name", "video_path", "image_path"),
    "caption": ("caption", "prompt", "text"),
    "first_image": ("first_image", "input_image"),
    "last_image": ("last_image", "end_image"),
}
TABLES = ("metadata.jsonl", "metadata.csv")
"""In a dataset's folder they list what is in it."""
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One video or image of a dataset, with its caption."""

    path: Path
    name: str
    """Path relative to the dataset's folder, with `/`."""
    caption: str
    images: Mapping[str, Path] = field(default_factory=dict)
    """Condition images by `first_image`, `last_image`."""
    references: tuple[Path, ...] = ()
    """Reference images, in their order."""


@dataclass
class Listing:
    """What a dataset's files say; media files have not been opened yet."""

    entries: list[Entry] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Problems of single clips."""
    problems: list[str] = field(default_factory=list)
    """Problems of the dataset as a whole."""
    passed_over: list[Path] = field(default_factory=list)
    """Files of a folder that are neither clips nor their captions."""


def read_source(path: Path) -> Listing:
    """List the clips of a folder, a `.csv` or a `.jsonl` file, in a stable order.

    A folder with a table of a usual name in it is what that table lists.
    """
    if path.is_dir():
        return _read_folder_or_table(path)
    if not path.is_file():
        return Listing(problems=[f"{path}: no such file or folder (data.sources)"])
    if path.suffix.lower() not in (".csv", ".jsonl"):
        return Listing(problems=[f"{path}: a dataset is a folder, a .csv or a .jsonl file"])
    return _read_table(path)


def is_read_whole(path: Path) -> bool:
    """Whether all that lies below a path are clips of the dataset: a folder without a table."""
    return path.is_dir() and not _tables(path)


def _tables(folder: Path) -> list[Path]:
    return [folder / name for name in TABLES if (folder / name).is_file()]


def _read_folder_or_table(folder: Path) -> Listing:
    tables = _tables(folder)
    if len(tables) > 1:
        found = " and ".join(table.name for table in tables)
        return Listing(problems=[f"{folder}: {found} are both there; give the path of the one that counts"])
    return _read_table(tables[0]) if tables else _read_folder(folder)


def _read_folder(folder: Path) -> Listing:
    listing = Listing()
    root = folder.resolve()
    for path in _walk(root, listing):
        relative = path.relative_to(root).as_posix()
        try:
            media = _inside(root, relative)
            caption = _read_caption(root, path.with_suffix(".txt"))
            listing.entries.append(Entry(path=media, name=relative, caption=caption))
        except BrokenRow as error:
            listing.broken.append(f"{folder / relative}: {error}")
    if not listing.entries and not listing.broken:
        kinds = " ".join(SUFFIXES)
        listing.problems.append(f"{folder}: no videos or images here (looked for {kinds})")
    return listing


def _walk(root: Path, listing: Listing) -> Iterator[Path]:
    """Yield the media files below a folder, sorted the same way everywhere; hidden ones are left out."""
    found: list[Path] = []

    def cannot_read(error: OSError) -> None:
        listing.broken.append(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, names, files in os.walk(root, onerror=cannot_read):
        here = Path(folder)
        for name in sorted(names):
            if (here / name).is_symlink() and not name.startswith("."):
                listing.broken.append(f"{here / name}: a link to a folder; links to folders are not followed")
        names[:] = [name for name in names if not name.startswith(".")]
        shown = sorted(here / name for name in files if not name.startswith("."))
        media = [path for path in shown if path.suffix.lower() in SUFFIXES]
        captions = {path.with_suffix(".txt") for path in media}
        others = (path for path in shown if path.suffix.lower() not in SUFFIXES)
        listing.passed_over += [path for path in others if path not in captions]
        found += media
    yield from sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_caption(root: Path, path: Path) -> str:
    """Read the `.txt` beside a clip."""
    if not path.exists():
        raise BrokenRow(f"no caption: {path.name} is missing")
    _inside(root, path.relative_to(root).as_posix())
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BrokenRow(f"its caption {path.name} is not UTF-8 text") from None
    except OSError as error:
        raise BrokenRow(f"its caption {path.name} cannot be read: {error.strerror}") from error
    if not caption:
        raise BrokenRow(f"its caption {path.name} is empty")
    return caption


def _read_table(path: Path) -> Listing:
    listing = Listing()
    rows, names, problems = read_rows(path)
    listing.problems += problems + _column_problems(path, names, bool(rows))
    if listing.problems:
        return listing
    root = path.parent.resolve()
    for row in rows:
        try:
            listing.entries.append(_read_row(root, row))
        except BrokenRow as error:
            listing.broken.append(f"{path}, {row.place}: {error}")
    if not rows:
        listing.problems.append(f"{path}: no clips in it")
    return listing


def _read_row(root: Path, row: Row) -> Entry:
    if row.fault:
        raise BrokenRow(row.fault)
    written = _value(row, "path")
    if not written:
        raise BrokenRow(f"no path (column {' or '.join(COLUMNS['path'])})")
    media = _inside(root, written)
    if media.suffix.lower() not in SUFFIXES:
        raise BrokenRow(f"'{written}' is not a video or an image that is known ({' '.join(SUFFIXES)})")
    caption = _value(row, "caption")
    if not caption:
        raise BrokenRow(f"'{written}' has no caption (column {' or '.join(COLUMNS['caption'])})")
    images = {name: _value(row, name) for name in ("first_image", "last_image")}
    found = {name: _inside(root, value) for name, value in images.items() if value}
    return Entry(
        path=media,
        name=media.relative_to(root).as_posix(),
        caption=caption,
        images=found,
        references=tuple(_inside(root, path) for path in references.reference_paths(row)),
    )


def _value(row: Row, column: str) -> str:
    """The row's value under any of a column's names; empty if there is none."""
    for name in COLUMNS[column]:
        if name in row.others:
            raise BrokenRow(f"{name} = {row.others[name]}: must be text")
    given = {name: row.values[name] for name in COLUMNS[column] if row.values.get(name)}
    if len(given) > 1:
        raise BrokenRow(f"{' and '.join(given)} are both given and mean the same: keep one")
    return next(iter(given.values()), "")


def _inside(root: Path, written: str) -> Path:
    """Resolve a path that a dataset names; refuse what is missing or lies outside of its folder."""
    try:
        path = (root / written).resolve()
        inside = path.is_relative_to(root)
        exists = inside and path.exists()
    except (OSError, RuntimeError, ValueError):
        # A name too long, links in a circle, a zero byte.
        raise BrokenRow(f"{written!r} is not a path that can be opened") from None
    if not inside:
        if (root / written).is_symlink():
            raise BrokenRow(f"'{written}' is a link to {path}, outside of the folder; put that itself there")
        raise BrokenRow(f"'{written}' lies outside of the dataset's folder {root}")
    if not exists:
        raise BrokenRow(f"'{written}' does not exist in {root}")
    return path


def _column_problems(path: Path, names: set[str], has_rows: bool) -> list[str]:
    known = {*references.COLUMNS, *(name for aliases in COLUMNS.values() for name in aliases)}
    problems = [f"{path}: unknown column '{name}'{near}" for name, near in _misspelt(names, known)]
    for column in ("path", "caption"):
        if has_rows and not problems and not names & set(COLUMNS[column]):
            found = ", ".join(sorted(names)) or "none"
            wanted = " or ".join(COLUMNS[column])
            problems.append(f"{path}: no column {wanted} (found: {found})")
    return problems


def _misspelt(names: set[str], known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield unknown columns that look like a known one: other columns are the user's own and are ignored."""
    for name in sorted(names - known):
        # `caption_en`, `video_id` and `text2` are columns of their own, not misspellings.
        stem = name.rstrip("0123456789")
        if stem in known or name.startswith(tuple(f"{word}_" for word in known)):
            continue
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.8)
        if near:
            yield name, did_you_mean(name.lower(), near)
