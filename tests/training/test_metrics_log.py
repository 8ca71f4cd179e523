"""metrics.jsonl: a line for every step, also of a training that was resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqat.data.batch import Batch
from sqat.progress import SilentReporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches
from sqat.training.loop import fit
from sqat.training.metrics_log import MetricsLog, read_metrics
from sqat.training.resume import Evaluation
from sqat.training.resume_state import ResumeState


def train(folder: Path, values: list[float]) -> None:
    net = nn.Linear(2, 1)
    batches = Batches(
        lambda epoch: [[0], [1]], lambda rows: Batch({"x": torch.ones(1, 2)}, torch.ones(1), torch.ones(1))
    )
    config = TrainConfig(evaluate_every=2, lr_schedule="constant", warmup=0, learning_rate=0.5)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {"task": model(batch.inputs["x"]).square().mean()}

    fit(net, loss, batches, config, steps=4, seed=0, title="t", reporter=SilentReporter(),
        state=ResumeState(folder / "state", "key"), evaluation=Evaluation(lambda: {"pnr": values.pop(0)}, "pnr"),
        log=MetricsLog(folder / "run" / "metrics.jsonl", "train", "key", attempt=2))  # fmt: skip


def test_every_step_is_a_line_and_an_evaluation_adds_the_metrics(tmp_path: Path) -> None:
    train(tmp_path, [0.5, float("inf")])
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all((line["stage"], line["fingerprint"], line["attempt"]) == ("train", "key", 2) for line in lines)
    assert all(line["learning_rate"] == 0.5 and line["losses"]["task"] >= 0 and line["time"] > 0 for line in lines)
    assert [line.get("dev") for line in lines] == [None, {"pnr": 0.5}, None, {"pnr": None}]


def test_later_runs_append_and_a_line_that_was_cut_short_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "train", "key")
    log.write(1, {"task": 1.0}, 0.1)
    with path.open("a") as file:
        file.write('{"stage": "tra\n')
    log.write(1, {"task": 2.0}, 0.1)
    assert [line["losses"]["task"] for line in read_metrics(path)] == [1.0, 2.0]
    assert [json.loads(line) for line in path.read_text().splitlines()[::2]] == [*read_metrics(path)]


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    MetricsLog(tmp_path / "file" / "metrics.jsonl", "train", "key").write(1, {"task": 1.0}, 0.1)
