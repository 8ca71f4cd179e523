"""Of a damaged or hostile run folder, a report leaves out a part and says so; it never ends in an internal error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from sqat.checkpoint.manifest import damaged, manifest_digest
from sqat.checkpoint.store import Checkpoint
from sqat.cli import main
from tests.report.run_folder import Page, write_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

BIG = "9" * 400


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint]) -> Path:
    return write_run(tmp_path_factory.mktemp("report"), make_checkpoint)


def change_manifest(stage: str, **entries: Any) -> Callable[[Path], object]:
    """Change entries of a manifest, and make its own digest fit."""

    def change(run: Path) -> None:
        path = run / stage / "sqat.json"
        manifest = {**json.loads(path.read_text()), **entries}
        manifest["sha256"] = manifest_digest(manifest)
        path.write_text(json.dumps(manifest))

    return change


def replace_text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return change


def link(name: str, target: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)

    return change


def pipe(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


# File or folder -> what is changed in it, and the part that the page names as missing; empty where all can be shown.
CASES: dict[str, dict[str, tuple[Callable[[Path], object], str]]] = {
    "sqat.log": {
        "a log of bytes": (write("sqat.log", b"\xff\xfe\x00\x1b" * 999), ""),
    },
    "latency.json": {
        "an infinite ratio": (replace_text("latency.json", '"median": 2.0', '"median": Infinity'), "latency.json"),
        "a ratio of zero": (replace_text("latency.json", '"median": 2.0', '"median": 0'), "latency.json"),
        "a time that is a text": (replace_text("latency.json", '"cpu_ms": 8.0', '"cpu_ms": "8"'), "latency.json"),
        "a time of 400 digits": (replace_text("latency.json", '"cpu_ms": 8.0', f'"cpu_ms": {BIG}'), "latency.json"),
        "latencies that are a list": (write("latency.json", "[]"), "latency.json"),
    },
    "bench.json": {
        "deep latencies": (write("bench.json", "[" * 100_000), "bench.json"),
        "latencies that loop": (link("bench.json", "bench.json"), "bench.json"),
        "latencies from outside": (link("bench.json", "/etc/hostname"), "bench.json"),
    },
    "results.json": {
        "a metric of 400 digits": (replace_text("results.json", "0.76", BIG), "not measured"),
        "a metric that is a list": (replace_text("results.json", "0.76", "[1]"), "no readable metrics"),
        "an infinite metric": (replace_text("results.json", "0.76", "Infinity"), ""),
        "results that loop": (link("results.json", "results.json"), "not measured"),
        "results from outside": (link("results.json", "../../../results.json"), "not measured"),
    },
    "01-train": {
        "a history without steps": (change_manifest("01-train", history=[{"accuracy": 0.5}, {}]), ""),
        "a history of infinite steps": (change_manifest("01-train", history=[{"step": "inf", "accuracy": "nan"}]), ""),
        "infinite losses": (change_manifest("01-train", losses={"task": float("inf")}), ""),
        "losses of 1e308": (change_manifest("01-train", losses={"task": 1e308}), ""),
    },
    "02-prune": {
        "1e30 steps": (change_manifest("02-prune", steps=10**30), ""),
        "fewer than no steps": (change_manifest("02-prune", steps=-5), ""),
        "a manifest that is cut short": (write("02-prune/sqat.json", '{"format": 1'), "stage prune"),
        "a stage that is a link": (link("02-prune", "01-train"), "stage prune"),
        "a stage that loops": (link("02-prune", "02-prune"), "stage prune"),
    },
    "03-calibrate": {
        "a manifest without a stage": (write("03-calibrate/sqat.json", '{"format": 1}'), "stage calibrate"),
        "histograms that are changed": (write("03-calibrate/histograms.json", "{}"), "activations"),
    },
    "04-qat": {
        "weights that are cut short": (write("04-qat/model.safetensors", b"x"), "layers"),
        "weights that are a link to a device": (link("04-qat/model.safetensors", "/dev/zero"), "layers"),
    },
    "metrics.jsonl": {
        "metrics that are bytes": (write("metrics.jsonl", b"\xff\n\x00\n" * 99), "loss curves"),
        "metrics of one long line": (write("metrics.jsonl", b"[" * 5_000_000), "loss curves"),
        "metrics without steps": (write("metrics.jsonl", '{"losses": {}}\n{"losses": 1}\n'), "loss curves"),
        "metrics of wrong types": (write("metrics.jsonl", '{"step": true, "losses": {"a": "x"}}\n[]\n'), "loss curves"),
        "metrics that are a pipe": (pipe, "loss curves"),
        "metrics from outside": (link("metrics.jsonl", "/etc/hostname"), "loss curves"),
    },
    "run.json": {
        "a record of wrong types": (write("run.json", '{"command": [1, {}], "versions": [], "commit": {}}'), ""),
    },
    "05-export": {
        "an exported file that is a text": (write("05-export/model.int8.onnx", "text"), ""),
    },
}  # fmt: skip

# A page takes a second, so cases are tried together: the first of each file, the second of each, and so on.
ROUNDS = [dict(case for case in each if case is not None)
          for each in zip_longest(*(cases.items() for cases in CASES.values()))]  # fmt: skip


@pytest.mark.parametrize("cases", ROUNDS, ids=lambda cases: next(iter(cases)))
def test_a_part_is_left_out(
    cases: dict[str, tuple[Callable[[Path], object], str]],
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(shared, tmp_path / "runs" / "r")
    for change, _ in cases.values():
        change(run)
    assert main(["report", str(run), "--quiet", "--output", str(tmp_path / "r.html")]) == 0, capsys.readouterr().err
    text = Page((tmp_path / "r.html").read_text()).text
    for case, (_, part) in cases.items():
        assert part in text[text.index("What is missing") :], case
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "stage"),
    [("runs/r/02-prune/sqat.json", "stage prune"), ("runs/r/10-a.b.rejected", "stage a.b"),
     ("05-export/folder/config.json", "stage export"), ("out/model.safetensors", "the stage that wrote it")],
)  # fmt: skip
def test_the_hint_names_the_stage(place: str, stage: str) -> None:
    assert damaged("x", Path(place)).hint == f"run {stage} again with --force, or use another checkpoint"
