"""The run lock: a second run is told the holder, a killed holder is replaced, and no file stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sqat.errors import SqatError
from sqat.pipeline.lock import LOCK_FILE, run_lock
from sqat.pipeline.runner import lock_location
from tests.errors import raises_code

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from sqat.progress import SilentReporter
from sqat.pipeline.lock import run_lock
with run_lock(Path(sys.argv[1]), SilentReporter()):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of ``tmp_path / "runs"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_the_holder_and_replaces_a_killed_one(tmp_path: Path, holder: Any, recorder: Any) -> None:
    runs = tmp_path / "runs"
    before = (runs / LOCK_FILE).read_bytes()
    who = rf"pid {holder.pid} on \S+ since [0-9-]+ [0-9:]+ \(-c {re.escape(str(runs))}\)"
    with raises_code("locked", who), run_lock(runs, recorder):
        pytest.fail("both hold it")
    assert (runs / LOCK_FILE).read_bytes() == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(runs, recorder):
        assert re.search(who, recorder.lines[0])
        assert json.loads((runs / LOCK_FILE).read_bytes())["pid"] == os.getpid()
    assert not list(runs.iterdir())


@pytest.mark.parametrize("end", [SqatError("x", code="usage"), KeyboardInterrupt()])
def test_it_is_released_however_the_run_ends(tmp_path: Path, end: BaseException, recorder: Any) -> None:
    def hold_twice() -> None:
        with run_lock(tmp_path, recorder):
            with raises_code("locked", f"pid {os.getpid()} on"), run_lock(tmp_path, recorder):
                pytest.fail("held twice")
            raise end

    with pytest.raises(type(end)):
        hold_twice()
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path, recorder):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert recorder.lines == []


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'{"pid": ', b'{"pid": 1}', b'{"pid": 1, "host": "\xff\xfe'])
def test_a_killed_run_s_file_is_replaced_even_if_it_is_damaged(tmp_path: Path, content: bytes, recorder: Any) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with run_lock(tmp_path, recorder):
        assert json.loads((tmp_path / LOCK_FILE).read_bytes())["pid"] == os.getpid()
    assert len(recorder.lines) == (1 if content.strip(b"\0") else 0)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"name": 1}', b"\xff\xfe", b"notes\n" * 1000])
def test_a_file_that_is_no_lock_stays(tmp_path: Path, content: bytes, recorder: Any) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with raises_code("output-exists", "is not a lock file"), run_lock(tmp_path, recorder):
        pytest.fail("held")
    assert (tmp_path / LOCK_FILE).read_bytes() == content


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, recorder: Any) -> None:
    (tmp_path / "runs").write_text("a file")
    with raises_code("unwritable-file"), run_lock(tmp_path / "runs", recorder):
        pass


def test_a_file_that_is_no_longer_the_locked_one_stays(tmp_path: Path, recorder: Any) -> None:
    with run_lock(tmp_path, recorder):
        (tmp_path / LOCK_FILE).unlink()
        (tmp_path / LOCK_FILE).write_text("another's")
    assert (tmp_path / LOCK_FILE).read_text() == "another's"


def test_a_lock_file_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KeyError, match="of the work itself"), run_lock(tmp_path, recorder):
        raise KeyError("of the work itself")
    with run_lock(tmp_path, recorder):
        assert f"pid {os.getpid()} on" in recorder.lines[0]


@pytest.mark.parametrize(
    ("output", "folder", "file"),
    [
        ("runs/one/02-prune", "runs/one", LOCK_FILE),
        ("runs/other/02-prune", "runs/other", LOCK_FILE),
        ("runs/no-distill", "runs", f".no-distill{LOCK_FILE}"),
        ("elsewhere/10-qat", "elsewhere", LOCK_FILE),
    ],
)
def test_a_stages_folder_is_locked_with_the_run_it_stands_in(
    tmp_path: Path, output: str, folder: str, file: str
) -> None:
    assert lock_location(tmp_path / "runs" / "one", tmp_path / output) == (tmp_path / folder, file)


def test_all_ranks_raise_what_rank_0_raises(tmp_path: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    second = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr("sqat.distributed.process_state", lambda: second)
    monkeypatch.setattr("sqat.distributed.broadcast_from_rank0", lambda text: text)
    with run_lock(tmp_path, recorder):
        assert not list(tmp_path.iterdir()), "the first one holds it"
    monkeypatch.setattr(
        "sqat.distributed.broadcast_from_rank0", lambda text: json.dumps(["held", "wait", "runs", "locked"])
    )
    with raises_code("locked"), run_lock(tmp_path, recorder):
        pass
