"""Every outcome has its exit code and at most one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sqat.errors import GateError, SqatError
from sqat.pipeline import runner as pipeline
from tests.cli.calls import call, raising

ROOT = Path(__file__).parents[2]


BAD_CALLS = [
    (["rum"], "error: No such command 'rum'. Did you mean 'run'? (see sqat --help)"),
    (["run"], "error: Missing argument 'RECIPE' (see sqat run --help)"),
    (["run", "r.yaml", "--forse"], "error: No such option: --forse"),
    (["run", "x.yaml"], "error: x.yaml: no such recipe; did you mean r.yaml?"),
    (["run", "."], "error: .: is a folder, not a recipe; name a file in it: r.yaml"),
    (["run", "r.yaml", "--set", "seed=x"],
     "error: --set seed: seed needs a whole number from 0 to 4294967295, got 'x'"),
    (["run", "r.yaml", "--set", "data.dev=no.jsonl"], "error: --set data.dev: data.dev: no.jsonl: no such file"),
    (["run", "r.yaml", "--from", "qta", "--dry-run"], "error: --from qta: the recipe has no such stage"),
    (["train", "r.yaml", "--from", "gone"], "error: gone: no such file or folder"),
    (["qat", "r.yaml", "--stage", "prune"], "error: --stage: no qat stage 'prune'; allowed: qat"),
    (["evaluate", "r.yaml", "gone.onnx"], "error: gone.onnx: no such file or folder"),
    (["evaluate", "r.yaml", ".", "--split", "all"], "error: --split: no split 'all'; allowed: test, dev, train"),
    (["evaluate", "r.yaml", "."], "error: r.yaml: the recipe has no test split; add data.test or give --split dev"),
    (["inspect", "gone"], "error: gone: no such file or folder"),
    (["inspect", "r.yaml"], "error: r.yaml: is neither a checkpoint folder nor an .onnx file"),
    (["init", "gone.jsonl"], "error: gone.jsonl: no such file"),
    (["init", "train.jsonl", "--task", "ranking"],
     "error: --task: no task 'ranking'; allowed: classification, regression, relevance"),
    (["init", "train.jsonl", "-o", "r.yaml"],
     "error: r.yaml: exists already; give --force to overwrite it, or another --output"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), BAD_CALLS, ids=[" ".join(case[0]) for case in BAD_CALLS])
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(expected)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SqatError("bad row", "mend it", "train.jsonl:7", code="usage"), 2, "error: train.jsonl:7: bad row; mend it\n"),
        (GateError("parity lost", "", "export", code="missed-gate"), 3, "error: export: parity lost\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume from the last saved state\n"),
        (OSError(28, "No space left on device", "runs/r"), 2, "error: runs/r: No space left on device\n"),
        (ZeroDivisionError("oh\nno"), 1,
         "internal error: ZeroDivisionError (oh); run it again with -vv or SQAT_DEBUG=1 for the traceback\n"),
        (KeyError(), 1, "internal error: KeyError; run it again with -vv or SQAT_DEBUG=1 for the traceback\n"),
    ],
)  # fmt: skip
def test_every_outcome_has_its_code_and_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "run", raising(error))
    assert call(capsys, "run", "r.yaml") == (code, "", line)


def test_tracebacks_only_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "run", raising(SqatError("bad", code="usage")))
    monkeypatch.setenv("SQAT_DEBUG", "1")
    code, _, err = call(capsys, "run", "r.yaml")
    assert code == 2
    assert err.startswith("Traceback") and err.endswith("error: bad\n")  # noqa: PT018
    monkeypatch.setenv("SQAT_DEBUG", "0")
    assert call(capsys, "run", "r.yaml")[2] == "error: bad\n"
    monkeypatch.delenv("SQAT_DEBUG")
    assert "Traceback" not in call(capsys, "run", "r.yaml", "-v")[2]
    assert "Traceback" in call(capsys, "run", "r.yaml", "-vv")[2]


# No torch: only what happens to the signal counts.
# A background shell makes its children ignore SIGINT; the first lines undo that.
SLOW_RUN = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
from sqat import cli
def fake(loaded, reporter, **options):
    print("started", flush=True)
    time.sleep(60)
sys.modules["sqat.pipeline.runner"] = types.SimpleNamespace(run=fake)
sys.modules["sqat.cli.tables.results"] = types.SimpleNamespace(print_plan=None, print_results=None)
sys.exit(cli.main(["run", "r.yaml"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_with_130(number: signal.Signals, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (
        130,
        "interrupted; run the same command again to resume from the last saved state\n",
    )
    assert time.monotonic() - started < 20


FLOOD = """
import sys
from sqat import cli
cli.app.command("flood")(lambda: print("x\\n" * 1_000_000))
sys.exit(cli.main(["flood"]))
"""


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "x\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 1
