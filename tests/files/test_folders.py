"""The door for folders that are replaced: only a folder whose manifest names every file in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sqat.files.replace import (
    UNFINISHED,
    append_text,
    check_replaceable,
    make_folder,
    open_own,
    remove_folder,
    replace_directory,
    replace_file,
)
from tests.errors import raises_code

MARK = "sqat.json"


def write_ours(folder: Path, content: str = "old") -> None:
    """Write a folder of ours with two files."""
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_text(content)
    (folder / "part" / "config.json").write_text("{}")
    (folder / MARK).write_text(json.dumps({"files": {"weights": "1", "part/config.json": "2"}}))


def replace_ours(folder: Path) -> None:
    """Replace a folder by one of ours with one file."""
    with replace_directory(folder, MARK) as fresh:
        (fresh / "weights").write_text("new")
        (fresh / MARK).write_text(json.dumps({"files": {"weights": "1"}}))


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file and link below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_text() for path in paths
    }


@pytest.mark.parametrize("before", ["nothing", "empty", "empty folders", "ours", "seen by a desktop", "unfinished"])
def test_what_is_ours_is_replaced(before: str, tmp_path: Path) -> None:
    folder, fresh = tmp_path / "01-x", tmp_path / ".01-x.new"
    if before.startswith("empty"):
        (folder / ("a/b" if "folders" in before else "")).mkdir(parents=True)
    if before in ("ours", "seen by a desktop"):
        write_ours(folder)
    if before.startswith("seen"):
        (folder / "part" / ".DS_Store").write_text("")
    if before == "unfinished":
        fresh.mkdir()
        (fresh / UNFINISHED).write_text("")
        (fresh / "half").write_text("")
        write_ours(tmp_path / ".01-x.old")
    replace_ours(folder)
    assert snapshot(tmp_path) == {"01-x/weights": "new", f"01-x/{MARK}": '{"files": {"weights": "1"}}'}


FOREIGN: dict[str, Callable[[Path], object]] = {
    "notes": lambda place: (place.mkdir(), (place / "notes.txt").write_text("mine")),
    "notes in a folder": lambda place: ((place / "a").mkdir(parents=True), (place / "a/notes").write_text("mine")),
    "a file": lambda place: place.write_text("mine"),
    "a linked folder": lambda place: ((place.parent / "far").mkdir(), write_ours(place.parent / "far/01"),
                                      place.symlink_to(place.parent / "far/01")),
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
    "notes beside ours": lambda place: (write_ours(place), (place / "notes.txt").write_text("mine")),
    "a link beside ours": lambda place: (write_ours(place), (place / "data").symlink_to(place.parent)),
    "a hidden file beside ours": lambda place: (write_ours(place), (place / ".git").write_text("mine")),
    "notes where ours names a folder above": lambda place: (
        place.mkdir(), (place / "notes.txt").write_text("mine"),
        (place / MARK).write_text(json.dumps({"files": {"../01-x/notes.txt": "1", "*": "2"}})),
    ),
    "a manifest that is a link": lambda place: (write_ours(place.parent / "far"), place.mkdir(),
                                                (place / "weights").write_text("mine"),
                                                (place / MARK).symlink_to("../far/sqat.json")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["01-x", ".01-x.new", ".01-x.old"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_stays(kind: str, name: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / name)
    before = snapshot(tmp_path)
    with raises_code("output-exists", name):
        replace_ours(tmp_path / "01-x")
    remove_folder(tmp_path / name, MARK)
    assert snapshot(tmp_path) == before


def test_all_that_is_not_ours_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_ours(tmp_path / "x")
    for name in ("d.engine", "c", "b.fixed.onnx", "a.log"):
        (tmp_path / "x" / name).write_text("mine")
    with raises_code("output-exists", r"a\.log, b\.fixed\.onnx, c and 1 more.*; move what is yours out of the folder"):
        replace_ours(tmp_path / "x")
    with raises_code("output-exists", "move it away"):
        replace_ours(tmp_path / "x" / "c")


def test_what_comes_while_the_folder_is_written_stays(tmp_path: Path) -> None:
    write_ours(tmp_path / "x")
    with raises_code("output-exists", "notes"), replace_directory(tmp_path / "x", MARK) as fresh:
        (tmp_path / "x" / "notes").write_text("mine")
        (fresh / MARK).write_text("{}")
    assert (tmp_path / "x" / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"{}", b'{"files": 1}', b"\xff"])
def test_a_folder_with_a_damaged_manifest_is_set_aside(manifest: bytes, tmp_path: Path) -> None:
    write_ours(tmp_path / "x")
    (tmp_path / "x" / MARK).write_bytes(manifest)
    replace_ours(tmp_path / "x")
    assert (tmp_path / "x" / "weights").read_text() == "new"
    assert (tmp_path / "x.damaged" / "weights").read_text() == "old"
    (tmp_path / "x" / MARK).write_bytes(manifest)
    with raises_code("output-exists", r"x\.damaged"):
        check_replaceable(tmp_path / "x", MARK)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_APPEND, os.O_RDWR])
def test_a_file_of_ours_is_opened_only_as_itself(kind: str, flags: int, tmp_path: Path) -> None:
    victim, place = tmp_path / "victim", tmp_path / "run" / "sqat.log"
    place.parent.mkdir()
    if kind != "link to nothing":
        victim.write_text("mine")
    if kind.startswith("link"):
        place.symlink_to(victim)
    if kind == "hard link":
        place.hardlink_to(victim)
    if kind == "pipe":
        os.mkfifo(place)
    if kind == "folder":
        place.mkdir()
        with pytest.raises(IsADirectoryError):
            open_own(place, flags)
        return
    with raises_code("output-exists", "sqat.log: is a "):
        open_own(place, flags)
    assert not victim.exists() if kind == "link to nothing" else victim.read_text() == "mine"


def test_lines_are_appended(tmp_path: Path) -> None:
    for text in ("é\n", "\ud800\n"):
        append_text(tmp_path / "runs" / "sqat.log", text)
    assert (tmp_path / "runs" / "sqat.log").read_text() == "é\n\\ud800\n"


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_text("mine")
    (tmp_path / "x").symlink_to("far/x")
    replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "far" / "x").read_text() == "mine"
    (tmp_path / "state").symlink_to("far")
    with raises_code("output-exists", "state: is a link"):
        make_folder(tmp_path / "state")
    make_folder(tmp_path / "a" / "b")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
def test_a_name_that_no_file_has_cannot_be_written(name: str, tmp_path: Path) -> None:
    with raises_code("unwritable-file"):
        replace_file(tmp_path / name, b"")
    assert not [*tmp_path.iterdir()]
