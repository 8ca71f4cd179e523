"""Trackers get what the watcher is told, at steps that count on; one that fails does not end a training."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest

from sqat.checkpoint.manifest import load_manifest
from sqat.cli import main
from sqat.errors import SqatError
from sqat.pipeline.graph import resolve_graph
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import Recipe
from sqat.training import tracking
from sqat.training.tracking import TrackedReporter, flatten, open_trackers
from tests.tiny import Project, Recorder, write_project


class Kept:
    """A tracker that keeps what it is given, or fails at a step."""

    name = "kept"

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at, self.seen, self.over = fails_at, list[tuple[int, dict[str, float]]](), False

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route\nto host")
        self.seen.append((step, values))

    def finish(self) -> None:
        self.over = True


def fit_twice(watched: TrackedReporter) -> None:
    for title in ("train", "qat"):
        watched.start(title, 2)
        watched.advance(1, {"task": 1.0}, 8.0)
        watched.advance(2, {"task": 0.5, "pnr": float("inf")}, 8.0)
        watched.finish()
        watched.log({f"{title}/dev/f1": 0.75})


def test_steps_count_on_from_stage_to_stage() -> None:
    kept = Kept()
    fit_twice(TrackedReporter(SilentReporter(), [kept]))
    assert kept.seen == [
        (1, {"train/task": 1.0, "train/samples per second": 8.0}),
        (2, {"train/task": 0.5, "train/samples per second": 8.0}),
        (2, {"train/dev/f1": 0.75}),
        (3, {"qat/task": 1.0, "qat/samples per second": 8.0}),
        (4, {"qat/task": 0.5, "qat/samples per second": 8.0}),
        (4, {"qat/dev/f1": 0.75}),
    ]


def test_a_tracker_that_fails_is_given_up_and_told() -> None:
    lines, failing, kept = Recorder(), Kept(fails_at=2), Kept()
    fit_twice(TrackedReporter(lines, [failing, kept]))
    assert lines.lines == ["kept failed and is dropped, the run goes on: no route"]
    assert [step for step, _ in failing.seen] == [1]
    assert [step for step, _ in kept.seen] == [1, 2, 2, 3, 4, 4]


def test_trackers_are_closed_whatever_ends_the_run(
    pipeline: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(tracking, "start_tracker", lambda *_: [kept])
    monkeypatch.setattr(tracking, "is_installed", lambda _: True)
    recipe = load_recipe(pipeline.recipe, ["trackers=[wandb]"]).recipe
    with pytest.raises(KeyboardInterrupt), open_trackers(recipe, tmp_path, SilentReporter()):
        raise KeyboardInterrupt
    assert kept.over


def test_one_that_cannot_begin_is_named_in_a_line_and_the_others_are_closed(
    pipeline: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()

    def start(name: str, recipe: Recipe, directory: Path) -> list[Any]:
        return [kept] if name == "wandb" else really(name, recipe, directory)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no store at v1.2 of it; got 'x'. See https://example.org, then come again")

    really = tracking.start_tracker
    monkeypatch.setattr(tracking, "start_tracker", start)
    monkeypatch.setattr(tracking, "is_installed", lambda _: True)
    monkeypatch.setattr(tracking, "Accelerator", refuse)
    recipe = load_recipe(pipeline.recipe, ["trackers=[wandb,mlflow]"]).recipe
    with pytest.raises(SqatError) as raised, open_trackers(recipe, tmp_path, SilentReporter()):
        pass
    assert raised.value.problem == "mlflow cannot begin: no store at v1.2 of it"
    assert kept.over


def test_what_trackers_print_is_not_among_the_results(
    pipeline: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Loud(Kept):
        is_main_process = True

        def __init__(self, **_: object) -> None:
            super().__init__()
            self.trackers = [self]

        def init_trackers(self, project: str, config: object) -> None:
            print(f"{project} begins")

        def finish(self) -> None:
            print("and ends")

    monkeypatch.setattr(tracking, "is_installed", lambda _: True)
    monkeypatch.setattr(tracking, "Accelerator", Loud)
    with open_trackers(load_recipe(pipeline.recipe, ["trackers=[trackio]"]).recipe, tmp_path, SilentReporter()):
        print("a result")
    assert capsys.readouterr() == ("a result\n", "tiny begins\nand ends\n")


def test_mlflow_gets_names_that_it_takes() -> None:
    """By the pattern of mlflow.utils.validation, and with one made of every character that a keyboard has."""
    takes = re.compile(r"^[/\w.\- :]*$")
    figures = {"results/sparse int8 (a + b)/recall@10": 0.5, f"dev/{string.printable}": 1.0}
    mlflow, other = Kept(), Kept()
    mlflow.name = "mlflow"
    TrackedReporter(SilentReporter(), [mlflow, other]).log(figures)
    ((_, logged),) = mlflow.seen
    assert [*logged.values()] == [0.5, 1.0]
    assert all(map(takes.match, logged))
    assert "results/sparse int8 _a _ b_/recall_10" in logged
    assert other.seen == [(0, figures)]


def test_a_folder_that_wandb_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not tracking.is_installed("left_by_a_tracker")
    assert tracking.is_installed("json")


@pytest.fixture
def pipeline(tmp_path: Path) -> Project:
    return write_project(tmp_path)


def test_what_is_not_installed_is_told_before_anything_runs(
    pipeline: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    assert main(["run", str(pipeline.recipe), "--set", "trackers=[wandb]", "--quiet"]) == 2
    assert "trackers: the tracker wandb is not installed; pip install wandb, or leave it out" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not list((pipeline.folder / "runs").rglob("sqat.json"))


def test_tensorboard_has_the_losses_and_the_metrics(pipeline: Project) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["run", str(pipeline.recipe), "--set", "trackers=[tensorboard]", "--quiet", "--no-rehearsal"]
    assert main([*words, "--to", "train"]) == 0
    manifest = load_manifest(pipeline.stage("train"))
    folder = pipeline.folder / "runs/tiny" / tracking.FOLDER
    (events,) = [path for path in folder.rglob("events.*") if path.parent.name == "tiny"]
    found: Any = EventAccumulator(str(events))
    found.Reload()
    losses = found.Scalars("train/task")
    assert [each.step for each in losses] == list(range(1, manifest.steps + 1))
    assert losses[-1].value == pytest.approx(manifest.losses["task"])
    (metric,) = found.Scalars("train/dev/accuracy")
    assert metric.value == pytest.approx(manifest.metrics["dev"]["accuracy"])
    graph = resolve_graph(load_recipe(pipeline.recipe))  # without trackers
    assert manifest.fingerprint == graph.nodes["train"].fingerprint


def test_values_are_flat_and_short() -> None:
    values = {"seed": 3, "stages": {"train": {"epochs": 1.5, "from": None, "bf16": True, "targets": ["x" * 400]}}}
    assert flatten(values) == {
        "seed": 3,
        "stages.train.epochs": 1.5,
        "stages.train.bf16": True,
        "stages.train.targets": ("['" + "x" * 400)[:250],
    }
