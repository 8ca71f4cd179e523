"""The door for files that are read: regular files of a bounded size, UTF-8, JSON of a bounded depth."""

from __future__ import annotations

import ast
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import sqat
from sqat.files.read import (
    MAX_DEPTH,
    MAX_DIGITS,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    try_read_object,
)
from tests.errors import raises_code


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "linked pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "linked folder": lambda path: path.symlink_to(path.parent),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "socket": make_socket,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [open_file, read_bytes, read_text, read_json])
def test_what_is_no_file_is_refused_at_once(
    read: Callable[[Path], object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 107 bytes
    KINDS[kind](Path("x"))
    start = time.monotonic()
    with raises_code("missing-file" if kind.endswith("nothing") else "unreadable-file", "^x: "):
        read(Path("x"))
    assert time.monotonic() - start < 5
    assert try_read_object(Path("x")) == {}


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
def test_a_path_that_no_file_has(name: str, tmp_path: Path) -> None:
    with raises_code("unreadable-file"):
        read_bytes(tmp_path / name)


def test_a_file_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_bytes(path, limit=5) == b"\xef\xbb\xbf{}"
    assert (read_text(path), read_json(path)) == ("{}", {})
    with raises_code("unreadable-file", "recipe.json: is larger than 4 bytes"):
        read_bytes(path, limit=4, place="recipe.json")


def test_a_hole_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 1 << 40)
    with raises_code("unreadable-file", "larger"):
        read_json(path)


def test_links_are_followed_only_above_the_root(tmp_path: Path) -> None:
    (tmp_path / "real" / "part").mkdir(parents=True)
    (tmp_path / "real" / "part" / "x").write_text("1")
    (tmp_path / "run").symlink_to("real")
    (tmp_path / "real" / "linked").symlink_to("part")
    (tmp_path / "real" / "part" / "y").symlink_to("x")
    run = tmp_path / "run"
    assert read_json(run / "part" / "x", root=run) == 1
    for name in ("linked/x", "part/y", "linked/y"):
        assert read_json(run / name) == 1
        with raises_code("unreadable-file", "is a link"):
            read_json(run / name, root=run)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "line 1, column 2"),
        (b"", "line 1, column 1"),
        (b"{\n'a': 1}", "line 2, column 1"),
        (b"[" * 100_000, "deep"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "deep"),
        (b'{"a\\ud800": 1}', "half a character: .*ud800"),
        (b'["\\uDFFF"]', "half a character: .*udfff"),
        (b"[%s]" % (b"9" * (MAX_DIGITS + 1)), "301 digits"),
        (b"9" * 10_000, "10000 digits"),
        (b'{"a": "\xff"}', "0xff"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_json_that_nothing_can_hold_is_told(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with raises_code("unreadable-file", expected):
        read_json(tmp_path / "x")
    assert try_read_object(tmp_path / "x") == {}


@pytest.mark.parametrize(
    "value",
    [{"a": [1, -2.5e300, None, True, "é\U0001f600\u202e"]}, 10 ** (MAX_DIGITS - 1), "\\ud", float("inf"), []],
)
def test_json_comes_back(value: object) -> None:
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


def test_the_deepest_that_is_allowed() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text, "x")) == text


@pytest.mark.parametrize("content", [b"[1]", b"null", b'"a"', b"1"])
def test_what_is_no_object_is_empty(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert try_read_object(tmp_path / "x") == {}
    (tmp_path / "x").write_bytes(b'{"a": 1}')
    assert try_read_object(tmp_path / "x") == {"a": 1}


def test_the_line_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\nb\n\xe9\n")
    with raises_code("unreadable-file", "x:3: is not UTF-8 text: byte 0xe9"):
        read_text(tmp_path / "x")


# Files of sqat itself, of its own temporary folders and of /proc; and a script that runs without sqat.
BESIDE_THE_DOOR = {"report/page.py", "models/loading.py", "hardware/machine.py", "runtime/sessions.py",
                   "bench/memory.py", "tensorrt/build_engine.py"}  # fmt: skip


def test_whatever_reads_a_file_reads_it_through_the_door() -> None:
    package = Path(sqat.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_reader(node.func)
    }
    assert found - {"files/read.py"} == BESIDE_THE_DOOR | {"export/engine_files.py"}  # a resource of the package


def is_reader(called: ast.Attribute) -> bool:
    """Whether a call reads a file: ``path.read_bytes()``, but not ``read.read_bytes(path)``; or ``json.load(file)``."""
    owner = ast.unparse(called.value)
    return (called.attr in ("read_bytes", "read_text") and owner != "read") or (owner, called.attr) == ("json", "load")
