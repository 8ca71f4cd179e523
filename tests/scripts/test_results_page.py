"""The results page: its figures are those of the runs, what is missing is told, and it keeps step with its data."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sqat.bench.intervals import Interval
from sqat.checkpoint.store import load_checkpoint, save_checkpoint
from sqat.errors import SqatError
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.runner import run as run_pipeline
from sqat.progress import SilentReporter
from sqat.runtime.sessions import session
from sqat.sparsity.semi_structured import pack
from tests.tiny import write_model

ROOT = Path(__file__).parents[2]

from scripts.results import applications, running, spread, timing, verdicts  # noqa: E402
from scripts.results.__main__ import main  # noqa: E402
from scripts.results.collecting import Run, packing_saves, runs_of, why_unsound  # noqa: E402
from scripts.results.page import render  # noqa: E402
from scripts.results.schema import (  # noqa: E402
    Application,
    Latency,
    PairInterval,
    Pictures,
    ResultsFile,
    Row,
    Seed,
    Setting,
    Timing,
    Try,
    read,
    write,
)
from scripts.results.tries import read_tries, try_of  # noqa: E402

WORDS = ("alpha", "beta", "gamma", "delta", "film", "movie", "good", "bad", "plot", "actor")
RECIPE = """# A tiny ranker of made-up passages,
# for the test of the page.
model: {source: model, max_length: 16}
task: {name: relevance, candidates: 3}
data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl, columns: {candidates: candidates}}
stages:
  train: {steps: 8, learning_rate: 3.0e-3, batch_size: 12}
  one-shot: {type: prune, from: train, steps: 4, batch_size: 12, schedule: {name: per-group, num_masks: 1}}
  calibrate: {samples: 16}
results:
  dense fp32: train
  sparse int8 (one-shot): one-shot
  sparse int8 (progressive + distillation): calibrate
"""


def passages(queries: int, seed: int) -> str:
    """JSONL: of a query's four passages the one with its words is relevant."""
    choose, lines = random.Random(seed), []
    for number in range(queries):
        query = choose.sample(WORDS, 2)
        rest = [word for word in WORDS if word not in query]
        texts = [choose.sample(rest, 3) for _ in range(3)] + [[*query, choose.choice(rest)]]
        candidates = [{"text": " ".join(text), "label": int(text is texts[-1])} for text in texts]
        lines.append(json.dumps({"query": f"{' '.join(query)} {number}", "candidates": candidates}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of which seeds 0 and 1 have run; read it, do not change it."""
    folder = tmp_path_factory.mktemp("project")
    torch.set_num_threads(1)
    write_model(folder / "model", words=WORDS, num_hidden_layers=1, max_position_embeddings=20)
    for seed, (split, queries) in enumerate((("train", 30), ("dev", 12), ("test", 12))):
        (folder / f"{split}.jsonl").write_text(passages(queries, seed))
    (folder / "relevance-pnr.yaml").write_text(RECIPE)
    for seed in (0, 1):
        run_pipeline(run_of(folder, seed).load(), SilentReporter())
    return folder


@pytest.fixture
def copied(project: Path, tmp_path: Path) -> Path:
    """The same project, to change."""
    return Path(shutil.copytree(project, tmp_path / "project"))


def run_of(folder: Path, seed: int) -> Run:
    return Run(folder / "relevance-pnr.yaml", seed, str(folder / "runs"))


def make_page(folder: Path, *more: str) -> tuple[str, dict[str, Any]]:
    """The page of a project and its results.json."""
    words = ["page", str(folder / "relevance-pnr.yaml"), "--output", str(folder / "runs")]
    assert main([*words, "--folder", str(folder / "page"), *more]) == 0
    return (folder / "page" / "RESULTS.md").read_text(), json.loads((folder / "page" / "results.json").read_text())


def raw(folder: Path, seed: int) -> dict[str, Any]:
    """What sqat itself wrote of a seed."""
    found: dict[str, Any] = json.loads((folder / "runs" / f"relevance-pnr-seed{seed}" / "results.json").read_text())
    return found


def main_table(page: str) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of the first table of the section on relevance."""
    lines = page.partition("## Relevance, judged by PNR")[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : lines.index("", start)]]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


@pytest.mark.pipeline
def test_figures_are_those_of_the_runs(project: Path) -> None:
    page, _ = make_page(project)
    table, runs = main_table(page), [raw(project, 0), raw(project, 1)]
    for label in runs[0]:
        for title, metric, digits in (("PNR", "pnr", 2), ("NDCG@10", "ndcg@10", 3), ("MRR", "mrr", 3)):
            values = np.array([run[label]["metrics"][metric] for run in runs], np.float64)
            expected = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            assert table[label][title].strip("*") == expected
        assert float(table[label]["MB"]) == pytest.approx(runs[0][label]["size_bytes"] / 1e6, abs=5e-4)
    assert "2 seeds, test" in page
    assert re.search(r"NDCG@10 at or above dense fp32: [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] points", page)
    assert "A tiny ranker of made-up passages, for the test of the page." in page


@pytest.mark.pipeline
def test_a_page_built_twice_is_the_same_and_names_no_folder(project: Path) -> None:
    first, results = make_page(project)
    text = json.dumps(results)
    assert make_page(project) == (first, results)
    assert str(project) not in first + text
    assert results["applications"]["relevance-pnr"]["data"]["train"]["file"] == "train.jsonl"


@pytest.mark.pipeline
def test_rendering_alone_needs_no_run(project: Path, tmp_path: Path) -> None:
    page, _ = make_page(project)
    (tmp_path / "results.json").write_bytes((project / "page" / "results.json").read_bytes())
    assert main(["page", "--render", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == page


@pytest.mark.pipeline
def test_what_is_missing_is_reported(copied: Path) -> None:
    run_of(copied, 2).load().run_directory.mkdir()
    file = copied / "runs" / "relevance-pnr-seed1" / "results.json"
    measured = json.loads(file.read_text())
    del measured["sparse int8 (one-shot)"]
    file.write_text(json.dumps(measured))
    page, results = make_page(copied)
    missing = results["applications"]["relevance-pnr"]["missing"]
    assert "seed 1, sparse int8 (one-shot): not measured yet" in missing
    assert "seed 2: no row (stage train has not run)" in missing
    assert "the recipe has no row 'dense int8'" in missing
    assert all(f"- {line}" in page for line in missing)
    assert main_table(page)["sparse int8 (one-shot)"]["PNR"].endswith("(1 of 2)")
    assert main_table(page)["dense int8"]["PNR"] == "-"
    assert "- Document retrieval (`recipes/retrieval.yaml`): no run yet" in page


@pytest.mark.pipeline
def test_a_row_of_another_recipe_does_not_count(copied: Path) -> None:
    recipe = copied / "relevance-pnr.yaml"
    recipe.write_text(RECIPE.replace("samples: 16", "samples: 8"))
    missing = make_page(copied)[1]["applications"]["relevance-pnr"]["missing"]
    reason = "sparse int8 (progressive + distillation): the recipe of stage calibrate has changed since"
    assert [line for line in missing if "changed" in line] == [f"seed 0, {reason}", f"seed 1, {reason}"]
    recipe.write_text("# Only another comment.\n" + RECIPE)
    assert not any("changed" in line for line in make_page(copied)[1]["applications"]["relevance-pnr"]["missing"])


@pytest.mark.pipeline
def test_a_current_row_counts_whatever_the_words_of_its_recipe(copied: Path) -> None:
    """Another name of the same data, beside a recipe in the checkpoint that this sqat does not read any more."""
    (copied / "same.jsonl").write_bytes((copied / "train.jsonl").read_bytes())
    recipe = copied / "relevance-pnr.yaml"
    recipe.write_text(RECIPE.replace("train: train.jsonl", "train: same.jsonl"))
    graph = resolve_graph(run_of(copied, 0).load())
    assert [why_unsound(graph, graph.nodes[name]) for name in ("train", "one-shot", "calibrate")] == ["", "", ""]

    there = graph.nodes["calibrate"].directory
    save_checkpoint(replace(load_checkpoint(there), recipe="of: another age"), there)
    graph = resolve_graph(run_of(copied, 0).load())
    assert why_unsound(graph, graph.nodes["calibrate"]) == ""
    recipe.write_text(RECIPE.replace("samples: 16", "samples: 8"))
    changed = resolve_graph(run_of(copied, 0).load())
    assert why_unsound(changed, changed.nodes["calibrate"]) == "the recipe of stage calibrate has changed since"


@pytest.mark.pipeline
def test_a_row_made_from_a_checkpoint_that_was_replaced_does_not_count(copied: Path) -> None:
    there = run_of(copied, 0).load().run_directory / "02-one-shot"
    checkpoint = load_checkpoint(there)
    save_checkpoint(replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"notes": ["again"]})), there)
    missing = make_page(copied)[1]["applications"]["relevance-pnr"]["missing"]
    assert "seed 0, sparse int8 (one-shot): not measured yet" in missing
    assert "seed 0, sparse int8 (progressive + distillation): stage calibrate was made from checkpoints that are no " \
        "longer there" in missing  # fmt: skip
    assert not any("dense fp32" in line for line in missing)


@pytest.mark.pipeline
def test_latency_is_shown_while_its_files_are_there(copied: Path) -> None:
    folder = run_of(copied, 1).load().run_directory
    own, half = Interval(median=1, low=1, high=1), Interval(median=1.834, low=1.8, high=1.871)
    rows = {
        label: Timing(cpu_ms=ms, cpu_p95_ms=9, wall_ms=9, wall_p95_ms=9, cpu_against={"dense fp32": ratio})
        for label, ms, ratio in (("dense fp32", 20.0, own), ("sparse int8 (one-shot)", 10.94, half))
    }
    digest = json.loads((folder / "01-train" / "sqat.json").read_text())["sha256"]
    latency = Latency(seed=1, cpu="a CPU", threads=1, load=2.5, versions={"onnxruntime": "1.0"},
                      settings=[Setting(batch=8, sequence=64, rounds=7, rows=rows)],
                      made_from={"dense fp32": digest}, left_out={})  # fmt: skip
    write(latency, folder / "latency.json")
    page, results = make_page(copied)
    row = main_table(page)["sparse int8 (one-shot)"]
    assert (row["ms, 8 x 64"], row["speed, dense fp32 = 1"]) == ("10.9", "1.83 (1.80 to 1.87)")
    assert "ONNX Runtime has no sparse kernel for CPUs" in page
    assert not any("latency" in line for line in results["applications"]["relevance-pnr"]["missing"])
    write(latency.model_copy(update={"made_from": {"dense fp32": "another"}}), folder / "latency.json")
    page, results = make_page(copied)
    assert "ms, 8 x 64" not in page
    assert any("latency" in line for line in results["applications"]["relevance-pnr"]["missing"])


@pytest.mark.pipeline
def test_tries_are_logged_from_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(copied, 1).load().run_directory
    recipe = copied / "relevance-pnr.yaml"
    recipe.write_text(RECIPE.replace("steps: 4, batch_size: 12", "steps: 9, batch_size: 12"))
    words = ["tried", str(run), "--recipe", str(recipe), "--folder", str(copied / "page")]
    assert main([*words, "--stage", "one-shot", "--verdict", "too | short"]) == 0
    assert main([*words, "--stage", "train", "--verdict", "as it was"]) == 0
    first, second = read_tries(copied / "page" / "tried.jsonl")
    manifests = {name: json.loads((run / name / "sqat.json").read_text()) for name in ("01-train", "02-one-shot")}
    assert first.changed == {"stages.one-shot.steps": 4}
    assert (second.changed, second.seed) == ({}, 1)
    assert first.figures == pytest.approx(manifests["02-one-shot"]["metrics"]["dev"])
    assert first.seconds == pytest.approx(sum(each["seconds"] for each in manifests.values()), abs=0.06)
    log = make_page(copied)[0].partition("## What was tried")[2]
    assert log.index("`stages.one-shot.steps: 4`") < log.index("as it was")
    assert "too \\| short" in log
    assert main([*words, "--stage", "qat", "--verdict", "none"]) == 2
    assert "no stage 'qat' with figures on dev; stages: train, one-shot" in capsys.readouterr().err


@pytest.mark.pipeline
def test_a_seed_that_fails_loses_no_other(copied: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    started: list[list[str]] = []

    def sqat(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 1, "", "")
        started.append(command)
        options["stderr"].write(b"some news\nerror: out of luck\n")
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(running.subprocess, "run", sqat)
    runs = [run_of(copied, seed) for seed in (5, 0, 6)]
    assert running.run_all(runs, processes=1) == 2
    assert [next(word for word in command if word.startswith("seed=")) for command in started] == ["seed=5", "seed=6"]
    said = capfd.readouterr().out
    assert said.count("error: out of luck") == 2
    assert "seed 0: done already" in said
    assert running.status_of(runs[0]).startswith("failed (see ")
    assert running.status_of(runs[1]).startswith("done: 3 of 3 stages, 3 rows")
    assert running.status_of(run_of(copied, 9)) == "missing"


@pytest.mark.pipeline
def test_a_seed_that_runs_is_not_started_again(copied: Path) -> None:
    run = run_of(copied, 7)
    with running.lock(run.load().run_directory):
        assert running.status_of(run).startswith("running: 0 of 3 stages")
        with pytest.raises(SqatError, match="running in another process"):
            running.run_one(run, threads=1)
    assert running.status_of(run).startswith("stopped: 0 of 3")


def test_seeds_are_found_by_their_folders(tmp_path: Path) -> None:
    (tmp_path / "relevance-pnr.yaml").write_text(RECIPE)
    for name in ("relevance-pnr-seed10", "relevance-pnr-seed2", "relevance-pnr-seedling", "other-seed1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert [run.seed for run in runs_of(tmp_path / "relevance-pnr.yaml", str(tmp_path / "runs"))] == [2, 10]


def application(rows: dict[str, dict[str, list[float]]]) -> Application:
    """An application made of figures: row -> metric -> one a seed."""
    count = len(next(iter(next(iter(rows.values())).values())))
    seeds = {
        seed: Seed(
            rows={
                label: Row(made_by="x", metrics={name: values[seed] for name, values in metrics.items()}, size_bytes=1)
                for label, metrics in rows.items()
            },
            stages={},
        )
        for seed in range(count)
    }
    return Application(recipe="r", about="", model="m", split="test", commands=[], data={}, seeds=seeds)


def test_verdicts_are_paired_differences() -> None:
    dense, low, sparse = [0.70, 0.75, 0.80], [3.0, 3.5, 4.0], [0.704, 0.752, 0.803]
    last = "sparse int8 (progressive + distillation)"
    rows = {
        "dense fp32": {"pnr": [4.0, 4.0, 4.0], "ndcg@10": dense, "mrr": [0.5, 0.5, 0.5]},
        "dense int8": {"pnr": low, "ndcg@10": dense, "mrr": dense},
        last: {"pnr": [2.9, 3.4, 3.8], "ndcg@10": sparse, "mrr": [0.4, 0.5, 0.56]},
    }
    display = applications.APPLICATIONS["relevance-pnr"]
    pnr, ndcg, floor = verdicts.verdicts(display, application(rows))
    difference = np.array(sparse) - dense
    expected = f"{100 * difference.mean():+.2f} ± {100 * difference.std(ddof=1):.2f} points"
    assert (verdicts.show_difference(ndcg), ndcg.outcome) == (expected, "met")
    assert (verdicts.show_difference(pnr), pnr.outcome) == ("-0.13 ± 0.06", "not met")
    assert (floor.metric, floor.outcome) == ("mrr", "not met, though within the spread")
    del rows[last]
    assert verdicts.verdicts(display, application(rows))[0].row == "dense int8"


@pytest.mark.parametrize(("high", "outcome"), [(0.002, "not met, though within the interval"), (-0.0001, "not met")])
def test_an_interval_decides_how_a_miss_is_named(high: float, outcome: str) -> None:
    rows = {"dense fp32": {"ndcg@10": [0.7, 0.7]}, "sparse int8 (one-shot)": {"ndcg@10": [0.69, 0.70]}}
    interval = PairInterval(row="sparse int8 (one-shot)", against="dense fp32", metric="ndcg@10", low=-0.01, high=high)
    found = application(rows).model_copy(update={"intervals": [interval]})
    _, ndcg, _ = verdicts.verdicts(applications.APPLICATIONS["relevance-pnr"], found)
    assert ndcg.outcome == outcome
    assert verdicts.show_difference(ndcg) == f"-0.50 [-1.00, {100 * high:+.2f}] points"


def test_infinite_ratios_are_shown_and_skipped_of_differences() -> None:
    rows = {"dense fp32": {"pnr": [math.inf, 4.0]}, "dense int8": {"pnr": [5.0, 3.0]}}
    assert spread.differences(application(rows).seeds, "dense int8", "dense fp32", "pnr") == [-1.0]
    results = ResultsFile(applications={"relevance-pnr": application(rows)})
    assert main_table(render(results, []))["dense fp32"]["PNR"] == "∞"


FIGURE = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.lists(FIGURE, min_size=0, max_size=4), max_size=5))
def test_bold_is_above_all_others_by_both_spreads(rows: list[list[float]]) -> None:
    best = spread.outside_spread(rows)

    def clear(one: list[float], other: list[float]) -> bool:
        if len(one) < 2 or len(other) < 2:
            return False
        return bool(np.mean(one) - np.mean(other) > np.std(one, ddof=1) + np.std(other, ddof=1))

    others = [[other for place, other in enumerate(rows) if place != index and other] for index in range(len(rows))]
    ahead = [index for index, row in enumerate(rows) if others[index] and all(clear(row, o) for o in others[index])]
    assert ahead == ([] if best is None else [best])


def test_rounds_call_every_file_in_turn_and_in_changing_order() -> None:
    calls: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, outputs: None, inputs: Any) -> None:
            calls.append(self.name)

    sessions = {name: Fake(name) for name in "abc"}
    times = timing.time_rounds(sessions, {name: {} for name in "abc"}, rounds=8)
    rounds = ["".join(calls[start : start + 6]) for start in range(0, len(calls), 6)]
    assert {name: taken.shape for name, taken in times.items()} == dict.fromkeys("abc", (8, 2))
    assert all(sorted(each) == list("aabbcc") and each[::2] == each[1::2] for each in rounds)
    assert len(set(rounds)) > 1


def test_inputs_have_the_size_asked_for(tmp_path: Path) -> None:
    values = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 3, 4]),
    ]
    nodes = [helper.make_node("Identity", [value.name], [f"{value.name}_out"]) for value in values]
    outputs = [helper.make_tensor_value_info(f"{v.name}_out", v.type.tensor_type.elem_type, None) for v in values]
    graph = helper.make_graph(nodes, "g", values, outputs)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    model = session(tmp_path / "m.onnx", threads=1)
    inputs = timing.draw_inputs(model, tmp_path / "m.onnx", 5, 11)
    assert {name: value.shape for name, value in inputs.items()} == {
        "input_ids": (5, 11), "attention_mask": (5, 11), "sample": (5, 3, 4)
    }  # fmt: skip
    assert inputs["attention_mask"].min() == 1
    assert 0 <= inputs["input_ids"].min() <= inputs["input_ids"].max() == 6
    setting = timing.time_setting({"dense fp32": model}, {"dense fp32": tmp_path / "m.onnx"}, 5, 11, rounds=3)
    assert setting.rows["dense fp32"].cpu_against["dense fp32"].median == 1
    with pytest.raises(SqatError, match="dimension of tokens"):
        timing.draw_inputs(model, tmp_path / "m.onnx", 5, None)


@pytest.mark.parametrize(("kind", "bytes_each"), [(torch.int8, 1), (torch.float16, 2)])
def test_packed_size_is_that_of_the_packed_weight(kind: torch.dtype, bytes_each: int) -> None:
    weight = torch.zeros(64, 128, dtype=kind)
    weight[:, ::2] = 1
    assert weight.nbytes - packing_saves(weight.numel(), bytes_each) == pack(weight).bytes


def test_a_results_file_that_was_changed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(ResultsFile(applications={}), tmp_path / "results.json")
    assert read(ResultsFile, tmp_path / "results.json") == ResultsFile(applications={})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").write_text('{"format": 1, "applications": {}, "speed": 3}')
    assert main(["page", "--render", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'results.json'}: speed: Extra inputs")
    assert error.count("\n") == 1
    (tmp_path / "tried.jsonl").write_text('{"recipe": "x"}\n')
    with pytest.raises(SqatError, match=r"tried\.jsonl:1: changed: Field required"):
        read_tries(tmp_path / "tried.jsonl")


def test_pictures_are_shown_with_their_figures_by_part() -> None:
    made = application({"dense fp32": {"explained": [0.3]}})
    figures = {"train: frechet of x": 1.5, "test: frechet of x": 2.25, "train: chance": 0.1}
    made.pictures = Pictures(file="text-to-image.png", figures=figures)
    page = render(ResultsFile(applications={"text-to-image": made}), [])
    assert "](text-to-image.png)" in page
    assert "| pictures | train | test |" in page
    assert "| frechet of x | 1.5 | 2.25 |\n| chance | 0.1 | - |" in page


def test_a_folder_without_stages_was_not_tried(tmp_path: Path) -> None:
    with pytest.raises(SqatError, match="no finished stage"):
        try_of(tmp_path, tmp_path / "relevance-pnr.yaml", "none")


def test_the_page_in_the_repository_is_in_step() -> None:
    folder = ROOT / "recipes"
    results = read(ResultsFile, folder / "results.json")
    assert results is not None
    assert (folder / "RESULTS.md").read_text(encoding="utf-8") == render(results, read_tries(folder / "tried.jsonl"))


def test_every_recipe_of_the_page_has_the_rows_that_it_shows() -> None:
    for name, display in applications.APPLICATIONS.items():
        path = ROOT / "recipes" / f"{name}.yaml"
        if path.is_file():
            rows = yaml.safe_load(path.read_text(encoding="utf-8"))["results"]
            assert [label for label in rows if label not in display.rows] == [], name


def test_every_try_of_the_log_is_on_dev() -> None:
    assert all(isinstance(entry, Try) for entry in read_tries(ROOT / "recipes" / "tried.jsonl"))
