"""The page about a run: every section, everything escaped, nothing from outside, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sqat.checkpoint.manifest import load_manifest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.cli import main
from sqat.lint.apply_rules import parse_target
from sqat.lint.repair_file import lint_file
from sqat.report.latencies import read_latencies
from tests.bench.graphs import write_classifier
from tests.report.run_folder import RECIPE, Page, write_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

SECTIONS = ["verdict", "results", "trade", "curves", "layers", "activations", "lint", "stages", "recipe", "reproduce",
            "missing"]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint]) -> Path:
    return write_run(tmp_path_factory.mktemp("report"), make_checkpoint)


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(shared, tmp_path / "runs" / "a <run>")


@pytest.fixture(scope="module")
def whole(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """Its page, made once."""
    return page_of(shared, tmp_path_factory.mktemp("page") / "new" / "r.html")


def page_of(run: Path, output: Path | None = None) -> tuple[str, Page]:
    path = output or run / "report.html"
    assert main(["report", str(run), "--quiet", *([] if output is None else ["--output", str(output)])]) == 0
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def test_every_section_is_there(whole: tuple[str, Page]) -> None:
    _, page = whole
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS
    assert {each.removeprefix("#") for each in page.references} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids), "an id is of one element"
    assert page.tags.count("svg") == 1 + 3 + 3 + 1, (
        "trade-off; losses of train, prune and qat; zeros, SQNR, saturation; activations"
    )


def test_curves_are_those_of_the_metrics_log_and_the_manifest(whole: tuple[str, Page]) -> None:
    text = whole[1].text
    assert "2 of 10 steps" in text
    assert "1 of 5 steps" in text
    assert all(name in text for name in ("task loss", "minilm loss", "dev accuracy"))
    assert whole[0].count("sparsity</text>") == 2, "the axis and the legend of the one stage that prunes"


def test_nothing_comes_from_outside(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert all(each.startswith("#") for each in page.references)
    assert not re.search(r"https?:|@import|url\((?!#)|//[a-z]", text)


def test_everything_is_escaped(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "a <run>" in page.text
    assert "dense <b>fp32</b>" in page.text
    assert "sparse $int8$" in page.text
    assert "# what <this> is & why" in page.text
    assert not {"b", "i", "this", "run", "cpu"} & set(page.tags)
    assert "<b>" not in text


def test_the_verdict_has_the_figures(whole: tuple[str, Page]) -> None:
    text = re.sub(r"\s+", " ", whole[1].text)
    assert "sparse $int8$ reaches accuracy 0.7600, dense <b>fp32</b> 0.8000: it keeps 95.0 % of it" in text
    assert "2.00 times as fast as dense <b>fp32</b> (95 % interval 1.90 to 2.12)" in text
    assert "one run of one seed" in text


def test_the_results_are_those_of_the_run(shared: Path, whole: tuple[str, Page]) -> None:
    text, _ = whole
    cells = re.findall(r"<td>sparse \$int8\$</td>(.*?)</tr>", text, re.DOTALL)[0]
    shown = [re.sub(r"<[^>]+>|\s+", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", cells, re.DOTALL)]
    size = (shared / "05-export/model.int8.onnx").stat().st_size
    assert shown == [["0.7600"], ["-0.0400"], ["0.1000"], [f"{size / 1e6:.3g}"], ["4", "p95", "9.5"],
                     ["2.00", "1.90", "to", "2.12"]]  # fmt: skip
    heads = re.findall(r"<th>([^<]*)</th>", text[text.index('id="results"') :])[:3]
    assert heads == ["dev", "accuracy", "change"], "the recipe's own metric comes first"


def test_graphs_are_linted_by_their_targets(whole: tuple[str, Page]) -> None:
    text = whole[1].text
    assert "1 of 1 layer will run in float32 on onnx-fp32" in re.sub(r"\s+", " ", text)
    assert "05-export/model.int8.onnx" in text


def test_a_finding_has_its_advice(run: Path) -> None:
    """The file has a weight that no node reads."""
    model = onnx.load(run / "05-export" / "model.fp32.onnx")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "unused"))
    folder = run / "05-export"
    checkpoint = load_checkpoint(folder)
    broken = folder.parent / "broken.onnx"
    onnx.save(model, broken)
    save_again(folder, artifacts={**checkpoint.artifacts, "model.fp32.onnx": broken})
    findings = lint_file(folder / "model.fp32.onnx", parse_target("onnx-fp32")).findings
    text = re.sub(r"\s+", " ", page_of(run)[1].text)
    assert [finding.advice for finding in findings if finding.advice]
    assert all(finding.advice in text for finding in findings)


def test_how_to_make_it_again(shared: Path, whole: tuple[str, Page]) -> None:
    text = whole[1].text
    assert f"sqat report '{shared}'" in text
    assert re.search(r"sqat run .*recipe\.yaml", text)
    assert load_manifest(shared / "02-prune").sha256 in text


def test_an_incomplete_run_lists_what_is_missing(run: Path) -> None:
    for name in ("latency.json", "results.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "04-qat")
    _, page = page_of(run)
    flat = re.sub(r"\s+", " ", page.text)
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS
    assert "Nothing to compare" in flat
    assert "No latency beside this run" in flat
    for what in ("stage qat: has not run", "not measured", "no metrics.jsonl with", "no latency.json"):
        assert what in flat[flat.index("What is missing") :]
    assert page.tags.count("svg") == 2 + 3 + 1, "the losses of last steps; layers; activations"


def test_a_recorded_start_and_figures_of_an_earlier_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((run / "results.json").read_text())
    rows["sparse $int8$"]["key"] = "0" * 64
    (run / "results.json").write_text(json.dumps(rows))
    record = {"command": ["sqat", "run", "r.yaml", "--set", "seed=3"], "versions": {"torch": "9.9"}, "commit": "abc"}
    (run / "run.json").write_text(json.dumps(record))
    text = page_of(run)[1].text
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "result sparse $int8$: measured on an earlier file" in text
    assert text.count("(earlier file)") == 1
    assert "sqat run r.yaml --set seed=3" in text
    assert "torch 9.9" in text
    assert "commit abc" in text


def test_what_sqat_bench_wrote_is_shown(run: Path) -> None:
    (run / "latency.json").unlink()
    words = [f"x={run / '05-export/model.int8.onnx'}", "--backend", "onnxruntime", "--batch", "2", "--sequence", "5"]
    effort = ["--rounds", "3", "--min-seconds", "1e-6", "--max-seconds", "1e-6", "--quiet"]
    assert main(["bench", *words, *effort, "--json", str(run / "bench.json")]) == 0
    text = page_of(run)[1].text
    assert "ms, batch 2, 5 tokens" in text
    assert "baseline sparse $int8$@onnxruntime" in text, "it is called as in the results, by its file"


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"settings": 3}', '{"settings": [{}]}'])
def test_a_foreign_latency_file_is_reported(tmp_path: Path, text: str) -> None:
    for name in ("latency.json", "bench.json"):
        (tmp_path / name).write_text(text)
    missing: list[str] = []
    assert read_latencies(tmp_path, {}, missing) == []
    assert ["latency.json" in line for line in missing] == [True, False, True]
    assert ["cannot be read" in line for line in missing] == [True, True, False]


def test_files_of_other_runs_are_not_taken_for_results(run: Path) -> None:
    """A file that is none of the run's, though it is called as one of its rows is."""
    (run / "latency.json").unlink()
    words = [f"dense={run / '05-export/model.int8.onnx'}", f"sparse={write_classifier(run / 'other.onnx', seed=3)}"]
    effort = ["--rounds", "3", "--min-seconds", "1e-6", "--max-seconds", "1e-6", "--quiet", "--backend", "onnxruntime"]
    assert main(["bench", *words, *effort, "--batch", "2", "--json", str(run / "bench.json")]) == 0
    missing: list[str] = []
    files = {"dense": run / "05-export/model.fp32.onnx", "sparse": run / "05-export/model.int8.onnx"}
    (setting,) = read_latencies(run, {**files, "twin": files["sparse"]}, missing)
    assert list(setting.rows) == ["sparse@onnxruntime", "twin@onnxruntime", "another file, sparse@onnxruntime"]
    assert setting.baseline == "sparse@onnxruntime"
    assert missing == []


@pytest.mark.parametrize("entry", [3, {"metrics": None}, {"metrics": {"accuracy": "many"}}, {"metrics": [1]}, {}])
def test_damaged_results_are_reported(run: Path, entry: object) -> None:
    rows = json.loads((run / "results.json").read_text())
    rows["sparse $int8$"] = entry
    (run / "results.json").write_text(json.dumps(rows))
    missing = page_of(run)[1].text.partition("What is missing")[2]
    assert "result sparse $int8$: " in missing


def test_without_a_dense_row_nothing_is_called_dense(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"sparse $int8$": rows["sparse $int8$"]}))
    text = page_of(run)[1].text
    assert "Nothing to compare: no measured row whose label begins with 'dense'" in text


def test_a_folder_for_the_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--quiet", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("folder", "line"), [
    ("missing", "no such run folder"),
    (".", "the folder holds no stages of a run; run the recipe first"),
    ("runs/a <run>/02-prune", "the folder holds no stages of a run; name the folder above it"),
])  # fmt: skip
def test_a_folder_without_a_run_is_an_error(
    folder: str, line: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / folder)]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


def test_without_the_extra_it_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == "error: sqat report: jinja2 is not installed; pip install 'sqat[report]'\n"


def test_a_run_is_not_changed_and_gives_the_same_page(run: Path, tmp_path: Path, whole: tuple[str, Page]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    text = page_of(run, tmp_path / "r.html")[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    one, other = (re.sub(r"sqat (report|run) [^\n]*", "", each) for each in (text, whole[0]))
    assert one == other


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [380, 1400])
def test_a_browser_lays_it_out_without_overflow(whole: tuple[str, Page], tmp_path: Path, width: int) -> None:
    """The page in a frame as wide as a telephone or a screen says how wide it became; this copy alone has a script."""
    drawn = "[...document.querySelectorAll('svg text')].map(each => parseFloat(getComputedStyle(each).fontSize)"
    drawn += " * Math.hypot(each.getScreenCTM().a, each.getScreenCTM().b))"
    shown = f"[root.scrollWidth, root.clientWidth, innerWidth, Math.floor(10 * Math.min(...{drawn}))].join()"
    told = "<script>console.log('control'); const root = document.documentElement; "
    told += f"parent.postMessage({shown}, '*')</script>"
    (tmp_path / "copy.html").write_text(whole[0].replace("</body>", f"{told}</body>"), encoding="utf-8")
    heard = "<script>addEventListener('message', event => { document.title = event.data })</script>"
    frame = tmp_path / "frame.html"
    frame.write_text(f'<title>-</title>{heard}<iframe src="copy.html" width="{width}" height="900" frameborder="0">')
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1600,1000", "--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom",
               "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
               frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+),(\d+),(\d+),(\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:300]
    assert (found[1], found[3]) == (found[2], str(width)), "nothing reaches beyond what is seen without scrolling"
    assert int(found[4]) >= 70, "no text of a figure is smaller than 7 pixels"
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert len(console) == 1, console
    assert "control" in console[0]


def test_gates_and_whether_they_are_kept(whole: tuple[str, Page]) -> None:
    text = re.sub(r"\s+", " ", whole[1].text)
    assert ("Gates: prune (accuracy at most 0.5 below train): missed: dev accuracy 0.1250, allowed from 0.2500 "
            "(train 0.7500 - 0.5)") in text  # fmt: skip


def test_activations_of_every_site(shared: Path, whole: tuple[str, Page]) -> None:
    text = whole[1].text.partition("Values at each quantized site")[0].rpartition("Activations")[2]
    sites = load_manifest(shared / "03-calibrate").sites
    assert [site for site in sites if site.removeprefix("bert.encoder.layer.") not in text] == []
    assert "Most values saturate at " in whole[1].text
    assert "(25 %)" in whole[1].text
    assert "99.99 % of the values" in text


def test_saturation_of_every_layer(shared: Path, whole: tuple[str, Page]) -> None:
    saturated = {site: each.saturated for site, each in load_manifest(shared / "04-qat").sites.items()}
    assert "saturated inputs, %" in whole[1].text
    rows = re.findall(r"<tr><td>([\w.]+)</td><td>\d+</td>(.*?)</tr>", whole[0], re.DOTALL)
    cells = {name: re.findall(r"<td>(.*?)</td>", cells)[-1] for name, cells in rows}
    shares = {name: saturated.get(f"{name}:input") for name in cells}
    assert cells == {name: "-" if share is None else f"{100 * share:.3g}" for name, share in shares.items()}
    assert set(shares.values()) - {None}


def save_again(folder: Path, **changes: Any) -> None:
    """A checkpoint once more, in its own place, with something changed."""
    fresh = folder.with_name("fresh")
    save_checkpoint(replace(load_checkpoint(folder), **changes), fresh)
    shutil.rmtree(folder)
    fresh.rename(folder)


def test_a_recipe_without_gates_is_said_to_have_none(run: Path) -> None:
    for folder in run.glob("??-*"):
        save_again(folder, recipe=RECIPE.replace(", gates: {accuracy: {max_drop: 0.5}}", ""))
    verdict = page_of(run)[1].text.partition("Quality and speed")[0]
    assert "The recipe sets no gates." in verdict
    assert "Gates:" not in verdict


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("02-prune", "unknown, the stage has not run."),
        ("01-train", "unknown: gate accuracy of stage prune has no parent to compare with."),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_judged_is_neither_kept_nor_missing(gone: str, line: str, run: Path) -> None:
    shutil.rmtree(run / gone)
    text = re.sub(r"\s+", " ", page_of(run)[1].text).partition("Quality and speed")[0]
    assert f"Gates: prune (accuracy at most 0.5 below train): {line}" in text
    assert "sets no gates" not in text
