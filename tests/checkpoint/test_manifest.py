"""The manifest: every byte of it counts, and an error names what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqat.checkpoint import manifest as module
from sqat.checkpoint.manifest import load_manifest
from sqat.errors import SqatError
from tests.checkpoint.conftest import FILES, QUERY, assert_damaged, reseal


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_of_a_file_is_an_error(name: str, saved: Path) -> None:
    content = (saved / name).read_bytes()
    for position in {0, len(content) // 2, len(content) - 1}:
        flipped = bytearray(content)
        flipped[position] ^= 1
        (saved / name).write_bytes(bytes(flipped))
        assert_damaged(saved, saved / name)


def test_one_flipped_byte_of_the_manifest_is_an_error(saved: Path) -> None:
    path = saved / "sqat.json"
    content = path.read_bytes()
    codes = set()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(bytes(flipped))
        if not is_layout(content, position):
            with pytest.raises(SqatError) as error:
                load_manifest(saved)
            assert error.value.place == str(path)
            codes.add(error.value.code)
    assert codes <= {"damaged-checkpoint", "newer-format"}


def is_layout(content: bytes, position: int) -> bool:
    """A byte between two tokens, which JSON does not count as content."""
    flipped = bytearray(content)
    flipped[position] ^= 1
    try:
        return bool(json.loads(bytes(flipped)) == json.loads(content))
    except ValueError:
        return False


def test_a_changed_value_of_the_manifest_is_an_error(saved: Path) -> None:
    path = saved / "sqat.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    assert_damaged(saved, path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    assert_damaged(saved, saved / name)


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[]", b"{}", b'{"format": "1"}', b'{"format": 0}', b'{"format": 1}', b'{"format": 1, "stage": 3}',
     b"\xff\xfe\xff"],
)  # fmt: skip
def test_another_content_is_no_manifest(content: bytes, saved: Path) -> None:
    (saved / "sqat.json").write_bytes(content)
    assert_damaged(saved, saved / "sqat.json")


def test_a_newer_format_needs_a_newer_sqat(saved: Path) -> None:
    reseal(saved, lambda manifest: manifest.update(format=2, novelty={"a": 1}))
    assert assert_damaged(saved, saved / "sqat.json", "newer-format").hint == "upgrade sqat"


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m.update(type="polish"), "type"),
        (lambda m: m.update(seed="x"), "seed"),
        (lambda m: m["layers"][QUERY].update(dense="yes"), f"layers.{QUERY}.dense"),
        (lambda m: m["sites"].update(x={"shared_with": "x"}), "sites.x.saturated"),
    ],
)
def test_a_wrong_manifest_entry_is_named(edit: Callable[[dict[str, Any]], object], where: str, saved: Path) -> None:
    reseal(saved, edit)
    assert where in assert_damaged(saved, saved / "sqat.json").problem


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b/c/d", "a/../../secret", ".", "..", ""])
def test_a_file_outside_is_not_read(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "secret").write_text("x")
    reseal(saved, lambda manifest: manifest.update(files={name: hashlib.sha256(b"x").hexdigest()}))
    read: list[Path] = []
    monkeypatch.setattr(module, "file_digest", lambda path: read.append(path) or "x")
    assert_damaged(saved, saved / "sqat.json")
    assert not read


def test_a_folder_is_no_file(saved: Path) -> None:
    (saved / "folder").mkdir()
    reseal(saved, lambda manifest: manifest["files"].update({"folder": "0" * 64}))
    assert_damaged(saved, saved / "folder")


def test_another_path_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        assert_damaged(path, path, "not-a-checkpoint")


@pytest.mark.parametrize("value", [None, [], {}, "many"])
def test_a_metric_that_is_no_number_is_named(saved: Path, value: object) -> None:
    raw = json.loads((saved / "sqat.json").read_text())
    raw["history"] = [{"ndcg@10": value}]
    (saved / "sqat.json").write_text(json.dumps(raw))
    assert "history.0.ndcg@10" in assert_damaged(saved, saved / "sqat.json").problem
