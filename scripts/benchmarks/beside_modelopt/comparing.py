"""The order of a comparison: dense model, tries on dev with the first seed, results on test with every seed."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scripts.benchmarks.beside_modelopt import ours
from scripts.benchmarks.beside_modelopt.chain import Made, Phases, Sparse
from scripts.benchmarks.beside_modelopt.rows import (
    LEARNING_RATES,
    METRICS,
    QAT_SHARES,
    Comparison,
    Dense,
    Result,
    Settings,
    Try,
    write,
)
from scripts.benchmarks.beside_modelopt.sets import Trial
from sqat.compress.training_losses import task_loss
from sqat.errors import SqatError
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern


def chains(names: tuple[str, ...]) -> dict[str, Sparse]:
    """Chains by name.

    Raises:
        SqatError: one needs Model Optimizer, which is not installed.
    """
    found: dict[str, Sparse] = {"sqat": ours.sparse} if "sqat" in names else {}
    peers = {"modelopt-sparsegpt": "sparsegpt", "modelopt-magnitude": "sparse_magnitude"}
    selected = {name: mode for name, mode in peers.items() if name in names}
    if not selected:
        return found
    if find_spec("modelopt") is None:
        raise SqatError(
            "NVIDIA Model Optimizer is not installed",
            "pip install nvidia-modelopt, or --chains sqat",
            code="missing-package",
        )
    from scripts.benchmarks.beside_modelopt import theirs

    return found | {name: partial(theirs.sparse, mode) for name, mode in selected.items()}


@dataclass
class Comparing:
    """A comparison under way.

    Attributes:
        folder: of the dense models, so that a run that was stopped finds them.
    """

    record: Comparison
    path: Path
    folder: Path
    chains: dict[str, Sparse]

    def run(self, trial: Trial, first: bool) -> None:
        """All that is still missing of one set and seed; the first seed searches settings for the others."""
        missing = [name for name in self.chains if not self.has(trial, name)]
        teacher = self.dense(trial) if missing else None
        for name in missing:
            assert teacher is not None
            found = self.search(trial, name, teacher) if first else self.finish(trial, name, teacher)
            self.keep(found)

    def know(self, digests: dict[str, str]) -> None:
        """Remember which files the rows are of.

        Raises:
            SqatError: the file has rows of others.
        """
        known = self.record.data
        if changed := [name for name, digest in digests.items() if known.get(name, digest) != digest]:
            raise SqatError(
                f"the file has rows of another {changed[0]}", "name another file", str(self.path), code="usage"
            )
        self.record = self.record.model_copy(update={"data": {**known, **digests}})

    def has(self, trial: Trial, name: str) -> bool:
        """Whether this chain's result is there."""
        return any((row.set, row.seed, row.chain) == (trial.name, trial.seed, name) for row in self.record.results)

    def keep(self, rows: list[Dense | Try | Result]) -> None:
        """Add rows and write the file."""
        old = self.record
        added = {
            "dense": (*old.dense, *(row for row in rows if isinstance(row, Dense))),
            "tries": (*old.tries, *(row for row in rows if isinstance(row, Try))),
            "results": (*old.results, *(row for row in rows if isinstance(row, Result))),
        }
        self.record = old.model_copy(update=added)
        write(self.record, self.path)
        for row in rows:
            print(row.model_dump_json(), flush=True)

    def dense(self, trial: Trial) -> nn.Module:
        """The teacher: trained on the labels, and measured, once."""
        model, path = copy.deepcopy(trial.start), self.folder / f"{trial.name}-{trial.seed}.safetensors"
        known = any((row.set, row.seed) == (trial.name, trial.seed) for row in self.record.dense)
        if known and path.is_file():
            model.load_state_dict(load_file(path))
            return model.eval()
        begun, budget = time.monotonic(), trial.budget
        trial.train(model, task_loss(trial.task), budget.dense_steps, budget.dense_learning_rate)
        seconds = round(time.monotonic() - begun, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        if not known:
            test = trial.measure(model, "test")
            self.keep([Dense(set=trial.name, seed=trial.seed, test=test, seconds=seconds)])
        return model

    def search(self, trial: Trial, name: str, teacher: nn.Module) -> list[Dense | Try | Result]:
        """The better learning rate on dev, then the better calibration, then the better share for QAT: five tries.

        The first two are judged by the model fake-quantized before QAT. The first of equals stays.
        """
        begun, metric = time.monotonic(), METRICS[trial.name]
        ways = {rate: self.chains[name](trial, teacher, rate) for rate in LEARNING_RATES}
        tries = [calibrated(trial, name, phases, phases.calibrations[0], rate) for rate, phases in ways.items()]
        rate = max(tries, key=lambda row: row.dev[metric]).settings.learning_rate
        phases = ways[rate]
        tries += [calibrated(trial, name, phases, way, rate) for way in phases.calibrations[1:]]
        chosen = max((row for row in tries if row.settings.learning_rate == rate), key=lambda row: row.dev[metric])
        best, result = float("-inf"), None
        for share in QAT_SHARES:
            settings = chosen.settings.model_copy(update={"qat_share": share})
            with phases.qat(settings.calibration, rate * share) as made:
                dev = trial.measure(made.model, "dev")
                if dev[metric] > best:
                    best, result = dev[metric], finished(trial, name, settings, made)
            tries.append(Try(set=trial.name, chain=name, settings=settings, trained=True, dev=dev))
        assert result is not None
        return [*tries, result.model_copy(update={"seconds": round(time.monotonic() - begun, 1)})]

    def finish(self, trial: Trial, name: str, teacher: nn.Module) -> list[Dense | Try | Result]:
        """The chain with the settings that the first seed chose.

        Raises:
            SqatError: there are none yet.
        """
        known = [row for row in self.record.results if (row.set, row.chain) == (trial.name, name)]
        if not known:
            raise SqatError(
                f"no settings of {name} on {trial.name} are chosen yet",
                "run the first seed before the others",
                code="usage",
            )
        begun, settings = time.monotonic(), known[0].settings
        phases = self.chains[name](trial, teacher, settings.learning_rate)
        with phases.qat(settings.calibration, settings.learning_rate * settings.qat_share) as made:
            seconds = round(time.monotonic() - begun, 1)
            return [finished(trial, name, settings, made).model_copy(update={"seconds": seconds})]


def calibrated(trial: Trial, name: str, phases: Phases, way: str, rate: float) -> Try:
    """The model fake-quantized without QAT, measured on dev."""
    with phases.quantized(way) as model:
        dev = trial.measure(model, "dev")
    settings = Settings(learning_rate=rate, qat_share=0.0, calibration=way)
    return Try(set=trial.name, chain=name, settings=settings, trained=False, dev=dev)


def finished(trial: Trial, name: str, settings: Settings, made: Made) -> Result:
    """The finished model, measured on test."""
    zeros, test = zeros_of(made.weights), trial.measure(made.model, "test")
    return Result(set=trial.name, seed=trial.seed, chain=name, settings=settings, test=test, zeros=zeros, seconds=0.0)


def zeros_of(weights: list[torch.Tensor]) -> float:
    """Share of zeros.

    Raises:
        SqatError: weights that are not 2:4, so that a comparison would be none.
    """
    pattern = parse_pattern("2:4")
    if broken := sum(count_violations(weight, pattern) for weight in weights):
        raise SqatError(
            f"{broken} groups of the finished model are not 2:4",
            "report it: the comparison would be none",
            code="broken-rule",
        )
    zeros, whole = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    return round(zeros / whole, 4)
