"""What each command hands to the pipeline, and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import sqat
from sqat.checkpoint.manifest import Manifest
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.pipeline import runner as pipeline
from sqat.pipeline.plan import PlannedStage
from sqat.pipeline.results import ResultRow, Results
from sqat.progress import Reporter
from sqat.recipe.schema import LoadedRecipe
from tests.cli.calls import RECIPE, call, raising

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "run",
    "train",
    "prune",
    "reconstruct",
    "calibrate",
    "qat",
    "export",
    "evaluate",
    "inspect",
    "analyze",
    "engine",
    "doctor",
    "bench",
    "report",
    "init",
    "schema",
]


def plan_of(loaded: LoadedRecipe, **options: Any) -> list[PlannedStage]:
    return [
        PlannedStage(1, "train", "train", None, "a" * 16, Path("runs/r/01-train"), True, 100, 3200, 61.0),
        PlannedStage(2, "prune", "prune", "train", "b" * 16, Path("runs/r/02-prune"), False, 100, 3200, None),
    ]


def results_of(loaded: LoadedRecipe, reporter: Reporter, **options: Any) -> Results:
    reporter.start("train", 4)
    reporter.advance(4, {"loss": 0.5}, 10.0)
    reporter.finish()
    reporter.info("train: done")
    rows = [
        ResultRow("dense fp32", "train", {"accuracy": 0.9, "pnr": float("inf")}, 90_900_000, Path("runs/r/01-train")),
        ResultRow("sparse int8", "export", {"accuracy": 0.8}, 24_900_000, Path("runs/r/05-export/model.onnx")),
    ]
    return Results(rows, "dev", "c" * 64, Path("runs/r"))


def test_help_lists_every_command_and_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()] == COMMANDS
    for command in COMMANDS:
        code, out, _ = call(capsys, command, "--help")
        assert code == 0
        assert max(len(line) for line in out.splitlines()) <= 80
    assert "--install-completion" in call(capsys)[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"sqat {sqat.__version__}\n", "")


def test_run_prints_the_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "run", results_of)
    code, out, err = call(capsys, "run", "r.yaml")
    assert code == 0
    assert re.search(r"^dense fp32 +0\.9000 +inf +90\.9 +runs/r/01-train *$", out, re.MULTILINE)
    assert re.search(r"^sparse int8 +0\.8000 +- +24\.9 ", out, re.MULTILINE)
    assert "dev split, data cccccccccccc, run in runs/r" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "train: 4 steps\n" in err and "train: done\n" in err  # noqa: PT018
    assert "\x1b" not in out + err


def test_run_as_json_prints_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "run", results_of)
    code, out, _ = call(capsys, "run", "r.yaml", "--json")
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert code == 0
    assert value["rows"][0] == {
        "label": "dense fp32",
        "stage": "train",
        "metrics": {"accuracy": 0.9, "pnr": "Infinity"},
        "size_bytes": 90_900_000,
        "path": "runs/r/01-train",
        "difference": None,
        "latency": None,
    }
    assert value["data_digest"] == "c" * 64


def test_quiet_leaves_results_and_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "run", results_of)
    _, out, err = call(capsys, "run", "r.yaml", "-q")
    assert err == ""
    assert "dense fp32" in out
    log = (folder / "runs/r/sqat.log").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d train: [^\n]+\n){3,4}", log)


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "run", results_of)
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, "run", "r.yaml") == (0, "", "")


def test_run_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def fake(loaded: LoadedRecipe, reporter: Reporter, **options: Any) -> Results:
        seen.update(options, seed=loaded.recipe.seed, epochs=getattr(loaded.recipe.stages["qat"], "epochs", None))
        return results_of(loaded, reporter)

    monkeypatch.setattr(pipeline, "run", fake)
    flags = ["--from", "prune", "--to", "qat", "--force", "--set", "seed=3", "--set", "stages.qat.epochs=2"]
    assert call(capsys, "run", "r.yaml", *flags)[0] == 0
    assert seen.pop("rehearsal") is not None
    assert seen == {"first": "prune", "last": "qat", "force": True, "seed": 3, "epochs": 2}
    assert call(capsys, "run", "r.yaml", "--no-rehearsal")[0] == 0
    assert seen["rehearsal"] is None


def test_a_rehearsal_alone_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "run", raising(AssertionError("ran")))
    monkeypatch.setattr(pipeline, "rehearse_alone", lambda loaded, reporter, **options: seen.update(options))
    assert call(capsys, "run", "r.yaml", "--rehearse", "--from", "qat") == (0, "", "")
    assert seen == {"first": "qat", "last": None, "force": False}
    assert call(capsys, "run", "r.yaml", "--rehearse", "--no-rehearsal")[0] == 2


def test_dry_run_prints_the_plan_and_runs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sqat.pipeline.plan.make_plan", plan_of)
    monkeypatch.setattr(pipeline, "run", raising(AssertionError("ran")))
    code, out, err = call(capsys, "run", "r.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"^1 +train +- +aaaaaaa +100 +3,200 +1m01s +unchanged$", out, re.MULTILINE)
    assert re.search(r"^2 +prune +train +bbbbbbb +100 +3,200 +- +will run *$", out, re.MULTILINE)
    assert "1 of 2 stages will run, time unknown" in out
    assert not (folder / "runs").exists()
    plan = json.loads(call(capsys, "run", "r.yaml", "--dry-run", "--json")[1])
    assert [(stage["name"], stage["unchanged"], stage["directory"]) for stage in plan] == [
        ("train", True, "runs/r/01-train"),
        ("prune", False, "runs/r/02-prune"),
    ]


@pytest.mark.parametrize("kind", ["train", "prune", "calibrate", "qat", "export"])
def test_stage_commands_run_their_stage(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def fake(loaded: LoadedRecipe, name: str, reporter: Reporter, **options: Any) -> Path:
        seen.append((name, options))
        return Path("runs/r") / name

    monkeypatch.setattr(pipeline, "run_stage", fake)
    assert call(capsys, kind, "r.yaml") == (0, f"runs/r/{kind}\n", "")
    manifest = Manifest(stage="train", type="train", fingerprint="a" * 16, base_model="tiny", seed=0)
    save_checkpoint(Checkpoint(manifest), folder / "start")
    call(capsys, kind, "r.yaml", "--from", "start", "--output", "out", "--force")
    assert seen == [
        (kind, {"parent": None, "output": None, "force": False}),
        (kind, {"parent": Path("start"), "output": Path("out"), "force": True}),
    ]


def test_a_kind_with_two_stages_needs_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "run_stage", lambda loaded, name, reporter, **options: Path(name))
    (folder / "r.yaml").write_text(RECIPE.replace("  qat:\n", "  qat:\n  qat-b: {type: qat}\n"))
    line = "error: r: the recipe has 2 qat stages: qat, qat-b; choose one, e.g. --stage qat\n"
    assert call(capsys, "qat", "r.yaml") == (2, "", line)
    assert call(capsys, "qat", "r.yaml", "--stage", "qat-b") == (0, "qat-b\n", "")


@pytest.mark.parametrize(
    ("recipe", "flags", "distils"),
    [
        ("qat:", [], True),
        ("qat:", ["--no-distill"], False),
        ("qat: {distill: null}", [], False),
        ("qat: {distill: null}", ["--distill"], True),
        ("qat: {distill: {minilm_weight: 3}}", ["--distill"], True),
    ],
)
def test_distillation_by_flag(
    recipe: str,
    flags: list[str],
    distils: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Any] = []

    def fake(loaded: LoadedRecipe, name: str, reporter: Reporter, **options: Any) -> Path:
        seen.append(getattr(loaded.recipe.stages[name], "distill", None))
        return Path(name)

    monkeypatch.setattr(pipeline, "run_stage", fake)
    (folder / "r.yaml").write_text(RECIPE.replace("qat:", recipe))
    assert call(capsys, "qat", "r.yaml", *flags)[0] == 0
    assert (seen[0] is not None) is distils
    if "minilm_weight" in recipe:
        assert seen[0].minilm_weight == 3


def test_no_distill_repairs_a_recipe_without_a_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "run_stage", lambda loaded, name, reporter, **options: Path(name))
    (folder / "r.yaml").write_text(RECIPE.replace("  train:\n", ""))
    assert call(capsys, "qat", "r.yaml")[0] == 2
    assert call(capsys, "qat", "r.yaml", "--no-distill")[0] == 0


def test_evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fake(
        loaded: LoadedRecipe, artifact: Path, split: str, reporter: Reporter, *outputs: object
    ) -> dict[str, float]:
        assert (artifact, split, *outputs) == (Path("model.onnx"), "dev", None)
        return {"accuracy": 0.875, "pnr": float("nan")}

    monkeypatch.setattr(pipeline, "evaluate", fake)
    (folder / "model.onnx").touch()
    code, out, _ = call(capsys, "evaluate", "r.yaml", "model.onnx", "--split", "dev")
    assert code == 0
    assert re.search(r"^accuracy +0\.8750$", out, re.MULTILINE)
    out = call(capsys, "evaluate", "r.yaml", "model.onnx", "--split", "dev", "--json")[1]
    assert json.loads(out) == {
        "artifact": "model.onnx",
        "split": "dev",
        "metrics": {"accuracy": 0.875, "pnr": "NaN"},
    }


def test_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(call(capsys, "schema")[1])
    assert schema["properties"]["seed"]["default"] == 0
    assert call(capsys, "schema", "--output", "schema.json") == (0, "", "")
    assert json.loads((folder / "schema.json").read_text()) == schema


def test_init_prints_its_guess(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "dev", "test"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text('{"text": "a b", "label": 0}\n{"text": "b", "label": 1}\n')
    code, out, err = call(capsys, "init", "data/train.jsonl", "-o", "new/first.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "task: classification ('label' has 2 different values in the first 2 rows)",
        "columns: text = text, label = label",
        "train: data/train.jsonl",
        "dev: data/dev.jsonl",
        "test: data/test.jsonl",
        "wrote new/first.yaml, and recipe.schema.json for editors; next: sqat run new/first.yaml",
    ]
