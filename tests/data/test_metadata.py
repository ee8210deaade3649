"""Folders, .csv and .jsonl files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tworeel.data.metadata import read_source

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset folder with (empty) media files, and a secret beside it."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.mp4").touch()
    for name in ("a.mp4", "b.PNG", "sub/c.webm", "notes.md", ".hidden.mp4", "first.png"):
        (root / name).touch()
    for name in ("a", "b", "sub/c", "first"):
        (root / f"{name}.txt").write_text(f"caption of {name}\n", encoding="utf-8")
    return root


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def can_link(folder: Path) -> bool:
    try:
        (folder / "probe_link").symlink_to(folder / "a.mp4")
    except OSError:
        return False
    (folder / "probe_link").unlink()
    return True


def test_a_folder_is_read_recursively_and_sorted(folder: Path) -> None:
    listing = read_source(folder)
    assert [entry.name for entry in listing.entries] == ["a.mp4", "b.PNG", "first.png", "sub/c.webm"]
    assert listing.entries[-1].caption == "caption of sub/c"
    assert not listing.broken and not listing.problems


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_a_table_of_the_usual_name_is_that_table(folder: Path, name: str) -> None:
    rows = {
        "metadata.jsonl": '{"path": "a.mp4", "caption": "one"}',
        "metadata.csv": "path,caption\na.mp4,one",
    }
    write(folder / name, rows[name] + "\n")
    listing = read_source(folder)
    assert [(entry.name, entry.caption) for entry in listing.entries] == [("a.mp4", "one")]
    assert listing == read_source(folder / name)


def test_two_tables_in_a_folder_are_a_problem(folder: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).touch()
    [problem] = read_source(folder).problems
    assert "metadata.jsonl and metadata.csv are both there" in problem


def test_a_folder_without_clips_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "readme.md").touch()
    [problem] = read_source(tmp_path).problems
    assert str(tmp_path) in problem and ".mp4" in problem


def test_missing_and_unknown_sources_are_problems(tmp_path: Path) -> None:
    assert "no such file" in read_source(tmp_path / "nowhere").problems[0]
    assert ".csv or a .jsonl" in read_source(write(tmp_path / "a.xlsx", b"x")).problems[0]


def test_clips_without_captions_are_broken_and_the_others_are_kept(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("  \n")
    (folder / "sub" / "c.txt").write_bytes("déjà".encode("latin-1"))
    listing = read_source(folder)
    assert [entry.name for entry in listing.entries] == ["first.png"]
    assert [line.split(": ", 1)[1] for line in listing.broken] == [
        "no caption: a.txt is missing",
        "its caption b.txt is empty",
        "its caption c.txt is not UTF-8 text",
    ]


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_and_jsonl_are_read_with_or_without_a_mark_and_with_any_line_ends(
    folder: Path, bom: bytes, end: str
) -> None:
    lines = [
        "path,caption,first_image,id",
        'a.mp4,"a fox, ""red""",first.png,7',
        "sub/c.webm, ein Fuß ,,8",
        "",
    ]
    table = write(folder / "meta.csv", bom + end.join(lines).encode())
    objects = [
        {"path": "a.mp4", "caption": 'a fox, "red"', "first_image": "first.png", "id": 7},
        {"path": "sub/c.webm", "caption": "ein Fuß", "first_image": None, "tags": ["x"]},
    ]
    lines = [json.dumps(line, ensure_ascii=False) for line in objects]
    other = write(folder / "meta.jsonl", bom + end.join([*lines, "", ""]).encode())
    for path in (table, other):
        listing = read_source(path)
        assert not listing.broken and not listing.problems
        assert [entry.name for entry in listing.entries] == ["a.mp4", "sub/c.webm"]
        assert [entry.caption for entry in listing.entries] == ['a fox, "red"', "ein Fuß"]
        assert listing.entries[0].images == {"first_image": (folder / "first.png").resolve()}
        assert listing.entries[1].images == {}


def test_byte_order_marks_of_captions_are_not_part_of_them(folder: Path) -> None:
    write(folder / "a.txt", BOM + b"a fox\r\n")
    assert read_source(folder).entries[0].caption == "a fox"


def test_other_tools_column_names_are_known(folder: Path) -> None:
    path = write(folder / "meta.csv", "video,prompt,input_image,end_image\na.mp4,fox,first.png,b.PNG\n")
    [entry] = read_source(path).entries
    assert entry.caption == "fox" and sorted(entry.images) == ["first_image", "last_image"]


@pytest.mark.parametrize("name", ["captoin", "Caption", "frist_image", "filename", "paths"])
def test_misspelt_columns_are_problems_with_a_suggestion(folder: Path, name: str) -> None:
    path = write(folder / "meta.csv", f"path,caption,{name}\na.mp4,fox,x\n")
    [problem] = read_source(path).problems
    assert f"'{name}'" in problem and "did you mean" in problem


@pytest.mark.parametrize("name", ["caption_en", "video_id", "text2", "fps", "score", "vace_video"])
def test_columns_of_the_users_own_are_ignored(folder: Path, name: str) -> None:
    listing = read_source(write(folder / "meta.csv", f"path,caption,{name}\na.mp4,fox,x\n"))
    assert not listing.problems and len(listing.entries) == 1


def test_missing_columns_are_problems_that_list_what_was_found(folder: Path) -> None:
    [problem] = read_source(write(folder / "meta.csv", "file:clip\na.mp4\n")).problems[:1]
    assert "file:clip" in problem


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_columns_between_other_marks_than_commas_are_told(folder: Path, mark: str) -> None:
    content = f"path{mark}caption\na.mp4{mark}fox\n"
    [problem] = read_source(write(folder / "meta.csv", content)).problems
    assert problem.endswith(f"its columns are separated by {mark!r}; must be commas")


def test_a_caption_that_is_no_text_is_told_as_what_it_is(folder: Path) -> None:
    rows = [
        {"path": "a.mp4", "caption": 5},
        {"path": ["x", 1], "caption": "fox"},
        {"path": "a.mp4", "fps": 5},
    ]
    content = "\n".join(json.dumps(row) for row in rows)
    number, path, missing = read_source(write(folder / "meta.jsonl", content)).broken
    assert number.endswith("line 1: caption = 5: must be text")
    assert path.endswith('line 2: path = ["x", 1]: must be text')
    assert "has no caption" in missing


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_in_the_place_of_lines_is_one_problem(folder: Path, indent: int | None) -> None:
    rows = [{"path": "a.mp4", "caption": "fox"}] * 3
    listing = read_source(write(folder / "meta.jsonl", json.dumps(rows, indent=indent)))
    [problem] = listing.problems
    assert "holds a JSON list; a .jsonl has one object a line" in problem and not listing.broken


def test_broken_rows_are_named_by_number_all_at_once(folder: Path) -> None:
    rows = ["path,caption", "a.mp4,fox", "missing.mp4,fox", "a.mp4,", ",fox", "a.mp4,fox, red", "notes.md,x"]
    listing = read_source(write(folder / "meta.csv", "\n".join(rows)))
    assert len(listing.entries) == 1
    reasons = ["does not exist", "no caption", "no path", "more fields", "not a video or an image"]
    for number, (line, reason) in enumerate(zip(listing.broken, reasons, strict=True), start=3):
        assert f"row {number}:" in line and reason in line


def test_broken_json_lines_are_named_by_number(folder: Path) -> None:
    lines = [
        '{"path": "a.mp4", "caption": "fox"}',
        "{oops",
        "[1]",
        '{"path": 3, "caption": "x"}',
        "[" * 100_000,
    ]
    listing = read_source(write(folder / "meta.jsonl", "\n".join(lines)))
    assert len(listing.entries) == 1
    assert [f"line {n}:" in line for n, line in enumerate(listing.broken, start=2)] == [True] * 4


def test_two_names_for_one_thing_are_a_problem(folder: Path) -> None:
    listing = read_source(write(folder / "meta.csv", "path,video,caption\na.mp4,sub/c.webm,fox\n"))
    assert "path and video are both given" in listing.broken[0]


@pytest.mark.parametrize(
    "written",
    ["../secret.mp4", "sub/../../secret.mp4", "{parent}/secret.mp4", "/etc/passwd", "..\\secret.mp4"],
)
def test_paths_that_lead_outside_are_refused(folder: Path, written: str) -> None:
    written = written.format(parent=folder.parent.as_posix())
    line = json.dumps({"path": written, "caption": "x"})
    image = json.dumps({"path": "a.mp4", "caption": "x", "first_image": written})
    listing = read_source(write(folder / "meta.jsonl", f"{line}\n{image}\n"))
    assert not listing.entries and len(listing.broken) == 2


def test_absolute_paths_and_dots_inside_of_the_folder_are_fine(folder: Path) -> None:
    lines = [{"path": str(folder / "a.mp4"), "caption": "x"}, {"path": "sub/../b.PNG", "caption": "x"}]
    path = write(folder / "meta.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert [entry.name for entry in read_source(path).entries] == ["a.mp4", "b.PNG"]


@pytest.mark.parametrize("written", ["a\0.mp4", "x" * 5000 + ".mp4", "loop.mp4", ".", "a.mp4/b.mp4"])
def test_paths_that_cannot_be_opened_are_one_line(folder: Path, written: str) -> None:
    if can_link(folder):
        os.symlink("loop.mp4", folder / "loop.mp4")
    listing = read_source(write(folder / "meta.jsonl", json.dumps({"path": written, "caption": "x"})))
    assert not listing.entries and len(listing.broken) == 1 and "\n" not in listing.broken[0]


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refused(path: str) -> object:
        if Path(path).name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert read_source(folder).broken == [f"{folder.resolve() / 'sub'}: cannot be read: Permission denied"]


def test_links_that_lead_outside_are_refused(folder: Path) -> None:
    if not can_link(folder):
        pytest.skip("no links here")
    (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
    (folder / "link.txt").write_text("x")
    (folder / "inner.mp4").symlink_to(folder / "a.mp4")
    (folder / "inner.txt").symlink_to(folder.parent / "secret.mp4")
    (folder / "linked").symlink_to(folder.parent)
    listing = read_source(folder)
    assert [entry.name for entry in listing.entries] == ["a.mp4", "b.PNG", "first.png", "sub/c.webm"]
    assert len(listing.broken) == 3
    assert all("outside" in line or "links to folders" in line for line in listing.broken)
    assert any("'link.mp4' is a link to" in line for line in listing.broken)
    table = write(folder / "meta.csv", "path,caption\nlink.mp4,x\nlinked/secret.mp4,x\n")
    assert len(read_source(table).broken) == 2


@pytest.mark.parametrize(
    "content",
    [
        "path,caption\na.mp4,fox\n".encode("utf-16"),
        b'path,caption\n"a.mp4,fox',
        b"path,path,caption\n1,2,3\n",
    ],
)
def test_files_that_are_no_proper_table_are_problems(folder: Path, content: bytes) -> None:
    listing = read_source(write(folder / "meta.csv", content))
    assert len(listing.problems) == 1 and not listing.entries


@pytest.mark.parametrize("content", [b"", b"path,caption\n", BOM])
def test_empty_tables_are_problems(folder: Path, content: bytes) -> None:
    for name in ("meta.csv", "meta.jsonl"):
        assert read_source(write(folder / name, content if name.endswith("csv") else b"")).problems
