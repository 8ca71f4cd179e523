"""Small files are written whole or not at all, and pictures that cannot be written are told before the work begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqat.cli import main
from sqat.errors import SqatError
from sqat.files import replace
from sqat.files.replace import replace_file
from sqat.plots.figure import blank_figure, check_plot, save_figure


def test_a_file_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(place: Path, content: bytes) -> None:
        place.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace, "write_synced", fail)
    with pytest.raises(SqatError, match="file: cannot be written: No space left on device; free space") as caught:
        replace_file(path, b"new")
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_pictures_of_each_kind(tmp_path: Path) -> None:
    for ending, start in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        save_figure(blank_figure(2, 1), tmp_path / f"plot.{ending}")
        assert (tmp_path / f"plot.{ending}").read_bytes().startswith(start)
        save_figure(blank_figure(2, 1), tmp_path / f"plot.{ending}")  # it knows its own


@pytest.mark.parametrize("name", ["plot.txt", "plot"])
def test_another_kind_is_refused_before_anything_is_timed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SqatError, match="not written to a"):
        check_plot(tmp_path / name)
    check_plot(None)
    assert main(["bench", str(tmp_path / "nothing.onnx"), "--plot", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert "not written to a" in error
    assert error.count("\n") <= 2
