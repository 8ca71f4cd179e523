"""`sqat bench` as a whole on tiny models: its figures hang together, its table fits, bad flags are one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqat import cli
from sqat.bench.candidates import find_candidates, read_artifacts
from sqat.bench.measure import Grid, measure, pinned
from sqat.bench.parity import Parity
from sqat.bench.report import Report
from sqat.bench.rounds import Effort, RoundTimes
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.progress import SilentReporter
from sqat.runtime import LIBRARY
from tests.calibrated_encoders import calibrate
from tests.errors import raises_code
from tests.export.cpu_models import exported, texts
from tests.export.test_cpu_sparse import FAMILIES, LENGTHS

from .graphs import write_classifier, write_pictures

QUICK = ["--rounds", "3", "--min-seconds", "1e-6", "--max-seconds", "1e-6", "--quiet"]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("sqat.bench.rounds.REST", 0.0)
    monkeypatch.setitem(measure.__kwdefaults__, "memory", lambda *_: 5_000_000)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def by_hand(**seconds: float) -> Callable[..., RoundTimes]:
    """A timer that measures nothing: every call of a candidate took as long as said."""

    def timer(calls: Any, baseline: str, effort: Effort) -> RoundTimes:
        return RoundTimes({name: [[seconds[name.partition("@")[0]]] * 2] * 4 for name in calls}, True)

    return timer


def report_of(timer: Callable[..., RoundTimes], **paths: Path) -> Report:
    found, skipped = find_candidates(
        read_artifacts([f"{name}={path}" for name, path in paths.items()]), ["onnxruntime"]
    )
    return measure(found, found[0].name, Grid([2], [8]), Effort(), 1, SilentReporter(), skipped, timer=timer)


def test_times_ratios_and_parity_are_consistent(tmp_path: Path) -> None:
    slow, quick = write_classifier(tmp_path / "slow.onnx"), write_classifier(tmp_path / "quick.onnx", noise=1.0)
    report = report_of(by_hand(slow=0.2, quick=0.05), slow=slow, quick=quick)
    (setting,) = report.settings
    first, second = setting.rows["slow@onnxruntime"], setting.rows["quick@onnxruntime"]
    assert (first.speedup, first.parity) == (None, None)
    assert second.speedup is not None
    assert second.parity is not None
    assert (second.speedup.median, second.speedup.low) == (pytest.approx(4.0), pytest.approx(4.0))
    assert (second.p50_ms.median, second.p95_ms, second.calls) == (pytest.approx(50), pytest.approx(50), 8)
    assert second.rows_per_second == pytest.approx(40)
    assert second.parity.largest > 0
    assert report.subjects["slow@onnxruntime"].file_bytes == slow.stat().st_size
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_decisions_that_differ_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{name}={write_classifier(tmp_path / f'{name}.onnx', seed)}" for seed, name in enumerate("ab")]
    code, out, _ = call(capsys, *names, "--backend", "onnxruntime", "--batch", "32", "--sequence", "4", *QUICK)
    assert code == 0
    assert " !\n" in out
    assert "of 32 decisions differ" in out
    code, out, _ = call(capsys, names[0], f"c={tmp_path / 'a.onnx'}", "--backend", "onnxruntime", *QUICK)
    assert "decisions differ" not in out
    assert "0.0e+00" in out


def test_every_backend_here_on_one_model(
    tmp_path: Path, make_checkpoint: Callable[..., Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint in torch is its own oracle of twice the same; ONNX Runtime and OpenVINO agree on a file."""
    save_checkpoint(make_checkpoint(), tmp_path / "c")
    assert call(capsys, "one=c", "two=c", "--sequence", "8", *QUICK, "--json", "f.json")[0] == 0
    report = Report.model_validate_json((tmp_path / "f.json").read_text())
    assert [setting.batch for setting in report.settings] == [1, 8]
    assert all(setting.rows["two@torch"].parity.largest == 0 for setting in report.settings)  # type: ignore[union-attr]
    if find_spec("openvino"):
        write_classifier(tmp_path / "m.onnx")
        assert call(capsys, "m.onnx", "--batch", "4", *QUICK, "--json", "g.json")[0] == 0
        rows = json.loads((tmp_path / "g.json").read_text())["settings"][0]["rows"]
        assert rows["m@openvino"]["parity"]["largest"] < 1e-5
        assert rows["m@openvino"]["parity"]["differing"] == 0


@pytest.mark.skipif(not LIBRARY.is_file(), reason="no compiled kernels here")
def test_the_kernels_of_sqat_run_in_the_same_process(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cpu-sparse file beside the checkpoint it was made of, in torch, and a file for ONNX Runtime."""
    model, inputs = make_model("bert", **FAMILIES["bert"]), texts(LENGTHS, typed=True)  # a graph that is traced anyway
    checkpoint = calibrate(model, TextProcessor(tokenizer), inputs, "cpu", purpose="quantize")
    sparse, _ = exported(checkpoint, model, inputs, tmp_path)
    save_checkpoint(checkpoint, tmp_path / "qat")
    sparse.with_name("config.json").write_bytes(checkpoint.files["config.json"])
    found = [f"sparse={sparse}", "qat=qat", f"other={write_classifier(tmp_path / 'o' / 'm.onnx')}"]
    words = [*found, "--batch", "4", "--sequence", "12", "--baseline", "qat", "--json", "f.json"]
    code, out, _ = call(capsys, *words, "--backend", "sqat", "--backend", "torch", "--backend", "onnxruntime", *QUICK)
    assert code == 0
    (setting,) = Report.model_validate_json((tmp_path / "f.json").read_text()).settings
    parity = setting.rows["sparse@sqat"].parity
    assert parity is not None
    assert 0 < parity.largest < 0.05 * parity.scale, "the kernels compute what torch fake-quantizes"
    assert setting.rows["other@onnxruntime"].parity.problem == "output [4, 3] against [4, 2]"  # type: ignore[union-attr]
    assert "? 4x12 other@onnxruntime: not compared, output" in out


def test_its_table_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(tmp_path / "03-a-long-name-of-a-stage" / "model.int8.onnx")
    write_classifier(tmp_path / "07-another-long-name" / "model.int8.onnx", noise=0.1)
    words = ["03-a-long-name-of-a-stage/model.int8.onnx", "07-another-long-name/model.int8.onnx"]
    code, out, err = call(capsys, *words, *QUICK)
    assert (code, err) == (0, "")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert "\x1b" not in out
    assert "baseline" in out
    assert "time limit, not all ratios within 2 %" in out


def test_pictures_have_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "m.onnx")
    code, out, _ = call(capsys, "m.onnx", "--batch", "2", "--backend", "onnxruntime", *QUICK)
    assert code == 0
    assert "\nbatch 2 " in out
    assert "tokens" not in out


@pytest.mark.parametrize(("flags", "line"), [
    (["--batch", "0"], "--batch: must be whole numbers above 0 separated by commas, got '0'"),
    (["--sequence", "8,x"], "--sequence: must be whole numbers above 0 separated by commas, got '8,x'"),
    (["--sequence", "41"], "--sequence: the model has positions for 40 tokens, not 41"),
    (["--rounds", "0"], "--rounds: must be above 0, got 0"),
    (["--within", "nan"], "--within: must be above 0, got nan"),
    (["--max-seconds", "-1"], "--max-seconds: must be above 0, got -1"),
    (["--threads", "-1"], "--threads: must be 0 or more, got -1"),
    (["--threads", "9999"], "--threads: 9999 threads on "),
    (["--baseline", "x"], "--baseline: no candidates are called 'x'; choose one of m@onnxruntime"),
    (["--backend", "x"], "--backend: no backend 'x'; allowed: torch"),
    (["missing.onnx"], "missing.onnx: no such file or folder"),
])  # fmt: skip
def test_bad_flags_are_one_line(
    flags: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classifier(tmp_path / "m.onnx")
    backend = [] if "--backend" in flags else ["--backend", "onnxruntime"]
    code, out, err = call(capsys, "m.onnx", *backend, *QUICK, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1


def test_a_size_that_a_library_refuses_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(tmp_path / "m.onnx")
    (tmp_path / "config.json").write_text('{"vocab_size": 5000}')  # more than the file's table holds
    code, _, err = call(capsys, "m.onnx", "--backend", "onnxruntime", *QUICK)
    assert code == 2
    assert err.startswith("error: m@onnxruntime does not run batch 1, 128 tokens: ")
    assert err.rstrip().endswith("leave that size out")


def test_an_export_folder_names_its_files(
    tmp_path: Path, make_checkpoint: Callable[..., Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_checkpoint()
    files = {**made.files, "model.int8.onnx": b"x"}
    save_checkpoint(Checkpoint(made.manifest.model_copy(update={"layers": {}, "sites": {}}), files), tmp_path / "e")
    code, _, err = call(capsys, "e", *QUICK)
    assert (code, "give what is in it: model.int8.onnx" in err) == (2, True)


def test_the_baseline_can_be_named_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(tmp_path / "a.onnx")
    write_classifier(tmp_path / "b.onnx")
    for name in ("b", "b@onnxruntime"):
        words = ["a.onnx", "b.onnx", "--backend", "onnxruntime", "--batch", "1", "--baseline", name]
        assert call(capsys, *words, *QUICK, "--json", "f.json")[0] == 0
        assert json.loads((tmp_path / "f.json").read_text())["baseline"] == "b@onnxruntime"


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_classifier(tmp_path / "m.onnx")
    assert call(capsys, "m.onnx", "--backend", "onnxruntime", *QUICK, "--plot", "out/m.svg")[0] == 0
    assert (tmp_path / "out/m.svg").read_text().lstrip().startswith("<?xml")
    code, _, err = call(capsys, "m.onnx", "--backend", "onnxruntime", *QUICK, "--plot", "m.txt.zip")
    assert (code, "not written to a .zip" in err) == (2, True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_are_pinned_and_released() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with raises_code("usage"), pinned(len(before) + 1):
        pass


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_memory_is_that_of_the_model(tmp_path: Path) -> None:
    """A file with 20 MB of weights makes a process grow by as much; a tiny one hardly."""
    from onnx import TensorProto, helper, numpy_helper

    from sqat.bench.memory import peak_memory

    from .graphs import CONFIG, save

    def grown(width: int) -> int:
        weight = numpy_helper.from_array(np.ones((width, width), np.float32), "w")
        entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("pixels", "y")]
        node = helper.make_node("MatMul", ["pixels", "w"], ["y"])
        path = save(
            helper.make_graph([node], "g", entries[:1], entries[1:], [weight]), tmp_path / f"{width}.onnx", CONFIG
        )
        (candidate,), _ = find_candidates(read_artifacts([str(path)]), ["onnxruntime"])
        return peak_memory(candidate, {"pixels": np.ones((1, width), np.float32)}, 1)

    small, large = grown(16), grown(2240)
    assert 15e6 < large - small < 100e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_a_memory_process_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqat.bench import memory

    path = write_classifier(tmp_path / "m.onnx")
    (candidate,), _ = find_candidates(read_artifacts([str(path)]), ["onnxruntime"])
    with raises_code("lost-process"):
        memory.peak_memory(candidate, {}, 1)
    monkeypatch.setattr(memory, "TIME_LIMIT", 0.01)
    with raises_code("lost-process"):
        memory.peak_memory(candidate, {}, 1)


def test_unknown_memory_has_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise SqatError("its process ended with exit code -9", code="lost-process")

    monkeypatch.setitem(measure.__kwdefaults__, "memory", refuse)
    write_classifier(tmp_path / "m.onnx")
    code, out, _ = call(capsys, "m.onnx", "--backend", "onnxruntime", *QUICK)
    assert code == 0
    assert "memory of m@onnxruntime is unknown: its process ended with" in " ".join(out.split())


def test_figures_are_not_written_over_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--json a.onnx b.onnx`` forgets the file's name, and would write over a model."""
    before = write_classifier(tmp_path / "a.onnx").read_bytes()
    write_classifier(tmp_path / "b.onnx")
    code, _, err = call(capsys, "b.onnx", *QUICK, "--json", "a.onnx")
    assert (code, "a.onnx: the result is not written to a .onnx; name a .json file" in err) == (2, True)
    assert (tmp_path / "a.onnx").read_bytes() == before


def test_the_table_is_printed_before_the_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(tmp_path / "m.onnx")
    (tmp_path / "file").touch()
    code, out, err = call(capsys, "m.onnx", "--backend", "onnxruntime", *QUICK, "--json", "file/f.json")
    assert (code, "cannot be written" in err) == (2, True)
    assert "m@onnxruntime" in out


def test_an_empty_file_is_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.onnx").touch()
    code, _, err = call(capsys, "m.onnx")
    assert (code, "m.onnx: not an ONNX file" in err) == (2, True)


def test_infinite_differences_survive_json() -> None:
    found = Parity(largest=float("inf"), scale=float("inf"), rows=2)
    assert Parity.model_validate_json(found.model_dump_json()) == found
