"""A working folder with a recipe and its data, for every test of a command."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cli.calls import RECIPE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and its data; 80 columns, no colours, the usual signals afterwards."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a b", "label": "x"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("SQAT_DEBUG", "FORCE_COLOR", "NO_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return tmp_path
