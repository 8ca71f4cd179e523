"""Both data sets as sqat's tasks see them, the model that all chains start from, the one way to train and measure.

WikiQA: a cross-encoder that ranks, of questions with a right and a wrong sentence, each pair judged for itself. SST-2.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.beside_modelopt.rows import METRICS, MODEL, Budget, Figures
from sqat.data.batch import Batch, Processor, plan_batches
from sqat.data.rows import SplitName, column
from sqat.errors import SqatError
from sqat.evaluation.inference import logits_of, predict
from sqat.models.loading import load_pretrained
from sqat.progress import SilentReporter
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import TrainConfig
from sqat.tasks import Task
from sqat.tasks.splits import Splits
from sqat.training.batches import Batches
from sqat.training.data_parallel import Loss
from sqat.training.loop import fit
from sqat.training.resume_state import ResumeState

FILES = {"wikiqa": ("train-mixed", "dev-mixed", "test-mixed"), "sst2": ("train", "dev", "test")}
TASKS: dict[str, dict[str, Any]] = {
    "wikiqa": {"name": "relevance", "loss": "pointwise", "candidates": 5, "metric": METRICS["wikiqa"]},
    "sst2": {"name": "classification", "metric": METRICS["sst2"]},
}
COLUMNS: dict[str, dict[str, str]] = {
    "wikiqa": {"group": "qid", "passage": "text", "candidates": "candidates"},
    "sst2": {"text": "text", "label": "label"},
}


@dataclass
class Trial:
    """One data set with one seed: rows, batches and the model to begin with."""

    name: str
    seed: int
    budget: Budget
    splits: Splits
    processor: Processor
    start: nn.Module

    @property
    def task(self) -> Task:
        return self.splits.task

    def feed(self) -> Batches:
        """Training batches of this seed."""
        rows = self.splits.prepared("train", self.processor)
        lengths = column(rows, "length").tolist()

        def plan(epoch: int) -> list[list[int]]:
            units = self.task.training_groups(rows, self.seed, epoch)
            return plan_batches(lengths, units, self.budget.batch_size, self.seed, epoch)

        return Batches(plan, partial(self.processor.collate, rows))

    def observed(self) -> list[dict[str, torch.Tensor]]:
        """Model inputs of the first training rows, for masks and scales."""
        feed, found, rows = self.feed(), list[Batch](), 0
        for indices in feed.stream(0):
            if rows >= self.budget.observed_rows:
                break
            found.append(feed.collate(indices))
            rows += len(indices)
        return [batch.inputs for batch in found]

    def train(self, model: nn.Module, loss: Loss, steps: int, learning_rate: float) -> None:
        """Train in place: the same optimizer, batches and random numbers whoever calls."""
        config = TrainConfig(steps=steps, batch_size=self.budget.batch_size, learning_rate=learning_rate,
                           precision=self.budget.precision, save_every=1e9)  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            state = ResumeState(Path(scratch) / "state", "")
            fit(
                model,
                loss,
                self.feed(),
                config,
                steps=steps,
                seed=self.seed,
                title=self.name,
                reporter=SilentReporter(),
                state=state,
            )
        model.eval()

    def measure(self, model: nn.Module, split: SplitName) -> Figures:
        """The task's metrics in float32."""
        rows = self.splits.prepared(split, self.processor)
        logits = predict(partial(logits_of, model.eval()), rows, self.processor)
        return {name: round(value, 5) for name, value in self.task.metrics(logits, rows).items()}


def open_trial(name: str, folder: Path, seed: int, budget: Budget, model: str = MODEL) -> Trial:
    """Read a data set and build the pretrained model with a fresh head.

    Raises:
        SqatError: a file or the model is missing.
    """
    recipe = recipe_of(name, folder, seed, budget, model)
    splits = Splits(recipe, Path())
    head = {"num_labels": splits.task.outputs, **splits.task.config_fields}
    start, processor = load_pretrained("texts", recipe.model, Path(), head, seed)
    return Trial(name, seed, budget, splits, processor, start)


def recipe_of(name: str, folder: Path, seed: int, budget: Budget, model: str) -> Recipe:
    """The recipe whose data and task a set is."""
    files = dict(zip(("train", "dev", "test"), files_of(name, folder), strict=True))
    tree = {
        "seed": seed,
        "model": {"source": model, "max_length": budget.max_length},
        "task": TASKS[name],
        "data": {**{split: {"path": str(path)} for split, path in files.items()}, "columns": COLUMNS[name]},
        "stages": {"train": {"steps": budget.dense_steps}},
    }
    return Recipe.model_validate(tree)


def files_of(name: str, folder: Path) -> Sequence[Path]:
    """Train, dev and test file."""
    files = [folder.resolve() / f"{stem}.jsonl.gz" for stem in FILES[name]]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        how = "scripts/data/wikiqa.py writes it" if name == "wikiqa" else f"--{name} FOLDER names where it is"
        raise SqatError("no such file", how, str(missing), code="missing-file")
    return files


def digests(name: str, folder: Path) -> dict[str, str]:
    """Set and file -> sha256 of what the file holds, unpacked."""
    contents = {path.name: gzip.decompress(path.read_bytes()) for path in files_of(name, folder)}
    return {f"{name}/{file}": hashlib.sha256(content).hexdigest() for file, content in contents.items()}
