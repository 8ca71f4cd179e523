"""The page about a run: every section, everything escaped, nothing from outside, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sqat.checkpoint.manifest import load_manifest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.cli import main
from sqat.report.speeds import read_speeds
from tests.bench.graphs import CONFIG, save, write_classifier

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RECIPE = """\
# what <this> is & why
model: {source: tiny}
task: classification
data: {train: train.jsonl, dev: dev.jsonl}
stages:
  train: {steps: 10}
  prune: {steps: 10, schedule: {name: per-group, num_masks: 2}, gates: {accuracy: {max_drop: 0.5}}}
  calibrate:
  qat: {steps: 5}
  export: {targets: [onnx-fp32, onnx-int8]}
results: {"dense <b>fp32</b>": export/onnx-fp32, sparse $int8$: export/onnx-int8}
"""
LOG = """\
2026-01-01 00:00:00 train: 10 steps
2026-01-01 00:00:10 train: 5/10, task 1.5, 3.0 samples/s, 1m02s left
2026-01-01 00:00:11 train: done in 11s
2026-01-01 00:00:20 prune: 10 steps
2026-01-01 00:00:30 prune: 4/10, task 0.7, minilm 0.01, 3.0 samples/s, 2.0s left
2026-01-01 00:00:31 prune: done in 11s
"""
SECTIONS = ["verdict", "results", "trade", "curves", "layers", "activations", "lint", "stages", "recipe", "reproduce",
            "missing"]  # fmt: skip
EMPTY = {"area", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page as its elements, with those that are opened and closed counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in EMPTY else [tag]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def write_linear(path: Path) -> Path:
    """A graph of one product, which a linter has something to say of."""
    weight = numpy_helper.from_array(np.ones((32, 32), np.float32), "w")
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32]) for name in ("x", "logits")]
    node = helper.make_node("MatMul", ["x", "w"], ["logits"], name="linear")
    return save(helper.make_graph([node], "g", entries[:1], entries[1:], [weight]), path, {})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint]) -> Path:
    """A run's folder as the pipeline leaves it, with figures made up."""
    tmp_path = tmp_path_factory.mktemp("report")
    folder = tmp_path / "runs" / "a <run>"
    made = make_checkpoint()
    plain: dict[str, Any] = {"layers": {}, "sites": {}, "placement": ""}
    fitted = {"losses": {"task": 0.25}, "steps": 10}
    history = [{"step": 5.0, "accuracy": 0.5}, {"step": 10.0, "accuracy": 0.75}]
    parts: dict[str, dict[str, Any]] = {
        "train": {"type": "train", **plain, **fitted, "history": history, "metrics": {"dev": {"accuracy": 0.75}}},
        "prune": {
            "type": "prune",
            "sites": {},
            "placement": "",
            "losses": {"task": 0.5, "minilm": 0.01},
            "steps": 10,
            "metrics": {"dev": {"accuracy": 0.125}},
        },
        "calibrate": {"type": "calibrate"},
        "qat": {"type": "qat", "losses": {"task": 0.2}, "steps": 5},
    }
    histogram = {"width": 0.5, "counts": [70, 20, 8, 2], "covers": 1.75}
    seen = json.dumps(dict.fromkeys(made.manifest.sites, histogram)).encode()
    for number, (name, entries) in enumerate(parts.items(), 1):
        manifest = made.manifest.model_copy(update={"stage": name, **entries})
        bare = {"masks": {}, "amax": {}} if name == "train" else {"amax": {}} if name == "prune" else {}
        files = {**made.files, **({"histograms.json": seen} if name == "calibrate" else {})}
        whole = replace(made, manifest=manifest, recipe=RECIPE, files=files, **bare)
        save_checkpoint(whole, folder / f"{number:02d}-{name}")
    linear, scores = write_linear(tmp_path / "l.onnx"), write_classifier(tmp_path / "c.onnx")
    files = {"model.fp32.onnx": linear.read_bytes(), "model.int8.onnx": scores.read_bytes()}
    files["config.json"] = json.dumps(CONFIG).encode()
    manifest = made.manifest.model_copy(update={"stage": "export", "type": "export", "notes": ["<i>note</i>"], **plain})
    save_checkpoint(Checkpoint(manifest, files, recipe=RECIPE), folder / "05-export")
    (folder / "sqat.log").write_text(LOG)
    key = load_manifest(folder / "05-export").sha256
    figures = {"dense <b>fp32</b>": 0.8, "sparse $int8$": 0.76}
    rows = {label: {"key": f"{key}/x/y", "split": "dev", "data": "d" * 64, "metrics": {"f1": 0.1, "accuracy": value}}
            for label, value in figures.items()}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "latency.json").write_text(json.dumps(latency(list(figures))))
    return folder


def latency(labels: list[str]) -> dict[str, Any]:
    """`latency.json`: the second row twice as fast as the first."""
    ratio = {"median": 2.0, "low": 1.9, "high": 2.125}
    rows = {label: {"cpu_ms": 8.0 / (1 + number), "cpu_p95_ms": 9.5, "cpu_against": {labels[0]: ratio}}
            for number, label in enumerate(labels)}  # fmt: skip
    settings = [{"batch": 8, "sequence": 64, "rounds": 20, "rows": rows}]
    return {"threads": 1, "cpu": "a <CPU>", "load": 0.5, "settings": settings}


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


def test_curves_are_those_of_the_log_and_the_manifest(whole: tuple[str, Page]) -> None:
    text = whole[1].text
    assert "10 steps, of which 2 are known" in text
    assert "5 steps, of which 1 is known" in text
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


def test_how_to_make_it_again(shared: Path, whole: tuple[str, Page]) -> None:
    text = whole[1].text
    assert f"sqat report '{shared}'" in text
    assert "sqat run recipe.yaml" in text
    assert load_manifest(shared / "02-prune").sha256 in text


def test_a_bare_run_says_what_it_lacks(run: Path) -> None:
    for name in ("latency.json", "results.json", "sqat.log"):
        (run / name).unlink()
    shutil.rmtree(run / "04-qat")
    _, page = page_of(run)
    flat = re.sub(r"\s+", " ", page.text)
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS
    assert "Nothing to compare" in flat
    assert "No latency beside this run" in flat
    for what in ("stage qat: has not run", "not measured", "no sqat.log", "neither latency.json"):
        assert what in flat[flat.index("What is not here") :]
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
def test_a_foreign_latency_file_is_left_alone(tmp_path: Path, text: str) -> None:
    for name in ("latency.json", "bench.json"):
        (tmp_path / name).write_text(text)
    missing: list[str] = []
    assert read_speeds(tmp_path, {}, missing) == []
    assert ["latency.json" in line for line in missing] == [True, False, True]
    assert ["cannot be read" in line for line in missing] == [True, True, False]


def test_what_was_timed_beside_the_run_is_not_taken_for_a_result(run: Path) -> None:
    """A file that is none of the run's, though it is called as one of its rows is."""
    (run / "latency.json").unlink()
    words = [f"dense={run / '05-export/model.int8.onnx'}", f"sparse={write_classifier(run / 'other.onnx', seed=3)}"]
    effort = ["--rounds", "3", "--min-seconds", "1e-6", "--max-seconds", "1e-6", "--quiet", "--backend", "onnxruntime"]
    assert main(["bench", *words, *effort, "--batch", "2", "--json", str(run / "bench.json")]) == 0
    missing: list[str] = []
    files = {"dense": run / "05-export/model.fp32.onnx", "sparse": run / "05-export/model.int8.onnx"}
    (setting,) = read_speeds(run, {**files, "twin": files["sparse"]}, missing)
    assert list(setting.rows) == ["sparse@onnxruntime", "twin@onnxruntime", "another file, sparse@onnxruntime"]
    assert setting.baseline == "sparse@onnxruntime"
    assert missing == []


@pytest.mark.parametrize("entry", [3, {"metrics": None}, {"metrics": {"accuracy": "many"}}, {"metrics": [1]}, {}])
def test_damaged_results_are_told(run: Path, entry: object) -> None:
    rows = json.loads((run / "results.json").read_text())
    rows["sparse $int8$"] = entry
    (run / "results.json").write_text(json.dumps(rows))
    missing = page_of(run)[1].text.partition("What is not here")[2]
    assert "result sparse $int8$: " in missing


def test_without_a_dense_row_nothing_is_called_dense(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"sparse $int8$": rows["sparse $int8$"]}))
    text = page_of(run)[1].text
    assert "Nothing to compare: that takes a measured row whose label begins with 'dense'" in text


def test_a_folder_for_the_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--quiet", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("folder", "line"), [
    ("missing", "no such run folder"),
    (".", "the folder holds no stages of a run; run the recipe first"),
    ("runs/a <run>/02-prune", "the folder holds no stages of a run; name the folder above it"),
])  # fmt: skip
def test_what_is_no_run_is_one_line(
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
    one, other = (re.sub(r"sqat report [^\n]*", "", each) for each in (text, whole[0]))
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


def test_the_graph_of_these_tests_is_one(tmp_path: Path) -> None:
    onnx.checker.check_model(onnx.load(write_linear(tmp_path / "l.onnx")))


def test_gates_and_whether_they_are_kept(whole: tuple[str, Page]) -> None:
    text = re.sub(r"\s+", " ", whole[1].text)
    assert ("Gates: prune (accuracy at most 0.5 below train): misses it: dev accuracy 0.1250, allowed from 0.2500 "
            "(train 0.7500 - 0.5)") in text  # fmt: skip


def test_activations_of_every_site(shared: Path, whole: tuple[str, Page]) -> None:
    text = whole[1].text.partition("What calibration saw")[0].rpartition("Activations")[2]
    sites = load_manifest(shared / "03-calibrate").sites
    assert [site for site in sites if site.removeprefix("bert.encoder.layer.") not in text] == []
    assert "Most is clipped at " in whole[1].text
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
    checkpoint = load_checkpoint(folder)
    shutil.rmtree(folder)
    save_checkpoint(replace(checkpoint, **changes), folder)


def test_a_recipe_without_gates_is_said_to_have_none(run: Path) -> None:
    for folder in run.glob("??-*"):
        save_again(folder, recipe=RECIPE.replace(", gates: {accuracy: {max_drop: 0.5}}", ""))
    verdict = page_of(run)[1].text.partition("Quality and speed")[0]
    assert "The recipe sets no gates." in verdict
    assert "Gates:" not in verdict


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("02-prune", "not judged, since it has not run."),
        ("01-train", "not judged: the gate accuracy of stage prune has no parent to compare with."),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_judged_is_neither_kept_nor_missing(gone: str, line: str, run: Path) -> None:
    shutil.rmtree(run / gone)
    text = re.sub(r"\s+", " ", page_of(run)[1].text).partition("Quality and speed")[0]
    assert f"Gates: prune (accuracy at most 0.5 below train): {line}" in text
    assert "sets no gates" not in text


def test_a_calibration_that_kept_no_bounds_of_most_values(run: Path, whole: tuple[str, Page]) -> None:
    """One older than they are: strips without ticks, and the page says why."""
    file = "histograms.json"
    known = load_checkpoint(run / "03-calibrate").files
    bare = {site: {"width": each["width"], "counts": each["counts"]} for site, each in json.loads(known[file]).items()}
    save_again(run / "03-calibrate", files={**known, file: json.dumps(bare).encode()})
    text = page_of(run)[1].text
    line = "bounds of 99.99 %: stage calibrate was calibrated by an older sqat, which did not keep them"
    assert line in text
    assert line not in whole[1].text
    for said in ("99.99 % of the values", "The ticks are the bounds of the 99.99 % rule"):
        assert said in whole[1].text
        assert said not in text
    assert "right of the line values are clipped" in text


def test_an_older_calibration_has_no_histograms(run: Path) -> None:
    files = load_checkpoint(run / "03-calibrate").files
    save_again(run / "03-calibrate", files={name: files[name] for name in files if name != "histograms.json"})
    text = page_of(run)[1].text
    assert "No calibrate stage with histograms is here" in text
    assert "activations: stage calibrate was calibrated by an older sqat" in text
