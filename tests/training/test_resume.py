"""A training that is killed ends with the same weights, and damaged states are not used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqat.data.batch import Batch, plan_batches
from sqat.data.rows import column
from sqat.data.tokens import collate, tokenize
from sqat.errors import SqatError
from sqat.models.layer_selection import linear_layers
from sqat.modules.parametrize import insert_weights_, remove_weights_
from sqat.progress import SilentReporter
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.stages import TrainConfig
from sqat.recipe.tasks import ClassificationTask
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.tasks import build_task
from sqat.tasks.splits import load_rows
from sqat.training import resume_state
from sqat.training.batches import Batches
from sqat.training.loop import fit
from sqat.training.resume import Evaluation
from sqat.training.resume_state import Progress, ResumeState
from tests.training.comparing import equal, replace_config, weights


class KilledError(Exception):
    """As if the process had gone."""


@dataclass
class Bert:
    """A BERT with dropout on the reds and blues, fitted from scratch or from where it was killed."""

    folder: Path
    model: Callable[[], PreTrainedModel]
    rows: Any
    task: Any
    tokenizer: Any
    config: TrainConfig
    steps: int

    def run(
        self, kill_at: int | None, where: str = "before_step", key: str = "key", name: str = "state"
    ) -> list[Tensor]:
        """Weights after a fit; raises Killed at step ``kill_at``."""
        model = self.model()
        masks = {
            layer: nm_mask(linear.weight.detach().abs(), parse_pattern("2:4"))
            for layer, linear in linear_layers(model).items()
            if "encoder" in layer
        }
        transforms = insert_weights_(model, {layer: torch.ones_like(mask) for layer, mask in masks.items()}, ())
        generator = torch.Generator().manual_seed(9)
        values = torch.rand(self.steps, generator=generator).tolist()

        now = [0]

        def before_step(step: int) -> None:
            now[0] = step
            if where == "before_step" and step == kill_at:
                raise KilledError
            if step == 3:
                for layer, transform in transforms.items():
                    transform.mask.copy_(masks[layer])

        def measure() -> dict[str, float]:
            model.eval()
            torch.rand(5)  # draws that must not show
            return {"score": values[now[0]]}

        reporter = Watcher(kill_at if where == "reporter" else None)
        fit(model, self.loss, self.batches(), self.config, steps=self.steps, seed=4, title="t", reporter=reporter,
            state=ResumeState(self.folder / name, key), evaluation=Evaluation(measure, "score"),
            before_step=before_step)  # fmt: skip
        remove_weights_(model, transforms)
        assert all(not dict(model.named_parameters())[f"{layer}.weight"][~mask].any() for layer, mask in masks.items())
        self.said = reporter.lines
        return weights(model)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": self.task.loss(model(**batch.inputs).logits, batch)}

    def batches(self) -> Batches:
        lengths = column(self.rows, "length").tolist()
        units = self.task.training_groups(self.rows, 0, 0)
        return Batches(
            lambda epoch: plan_batches(lengths, units, self.config.batch_size, 0, epoch),
            partial(collate, self.rows, tokenizer=self.tokenizer),
        )


class Watcher(SilentReporter):
    """Counts steps, keeps what is said, and may raise."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.step, self.lines = kill_at, 0, list[str]()

    def info(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, step: int, values: Any, rate: float) -> None:
        self.step = step
        if step == self.kill_at:
            raise KilledError


@pytest.fixture
def bert(make_model: Callable[..., PreTrainedModel], tokenizer: Any, data_folder: Path) -> Bert:
    config = ClassificationTask()
    raw = load_rows(SplitConfig(path="train.jsonl"), "train", Columns(), config, data_folder)
    task = build_task(config, raw)
    rows = tokenize(task.encode(raw), tokenizer, 16)
    settings = TrainConfig(
        batch_size=8,
        gradient_accumulation=2,
        learning_rate=1e-3,
        save_every=0,
        evaluate_every=2,
        keep_checkpoint="last",
    )
    model = partial(make_model, "bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    return Bert(data_folder, model, rows, task, tokenizer, settings, 9)


def test_the_rule_is_learned(bert: Bert) -> None:
    """The data can be learned from at all, so that equal weights are not equal for want of a gradient."""
    model = bert.model()
    whole = collate(bert.rows, list(range(len(bert.rows))), bert.tokenizer)

    def loss_now() -> float:
        with torch.no_grad():
            return float(bert.task.loss(model.eval()(**whole.inputs).logits, whole))

    before = loss_now()
    config = replace_config(bert.config, learning_rate=3e-3)
    fit(model, bert.loss, bert.batches(), config, steps=40, seed=0, title="t", reporter=SilentReporter(),
        state=ResumeState(bert.folder / "learn", "k"))  # fmt: skip
    assert loss_now() < 0.2 < 0.6 < before


@pytest.mark.parametrize(
    ("optimizer", "keep", "where"),
    [("adamw", "mean", "before_step"), ("adamw", "best", "reporter"), ("sgd", "best", "before_step")],
)
def test_a_killed_fit_ends_with_the_same_weights(optimizer: str, keep: str, where: str, bert: Bert) -> None:
    kept: dict[str, Any] = {"ema": 0.6} if keep == "mean" else {"keep_checkpoint": keep}
    bert = replace(bert, config=replace_config(bert.config, optimizer=optimizer, **kept))
    unbroken = bert.run(None, name="unbroken")
    for kill_at in (1, 3, 8):
        name = f"{kill_at}"
        with pytest.raises(KilledError):
            bert.run(kill_at, where, name=name)
        resumed = bert.run(None, name=name)
        saved = kill_at if where == "before_step" else kill_at - 1
        assert bert.said == ([f"t: resumed at step {saved} of 9"] if saved else [])
        assert equal(resumed, unbroken), kill_at
    assert not equal(unbroken, weights(bert.model()))


def test_a_fit_killed_again_and_again_still_ends_there(bert: Bert) -> None:
    unbroken = bert.run(None, name="unbroken")
    for kill_at in (3, 3, 7):
        with pytest.raises(KilledError):
            bert.run(kill_at)
    assert equal(bert.run(None), unbroken)


def damage_tensors(folder: Path) -> None:
    (file,) = folder.glob("step-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def cut_tensors(folder: Path) -> None:
    (file,) = folder.glob("step-*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def drop_tensors(folder: Path) -> None:
    next(folder.glob("step-*.safetensors")).unlink()


def change_progress(folder: Path) -> None:
    index = json.loads((folder / "state.json").read_text())
    index["progress"]["step"] += 1
    (folder / "state.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        cut_tensors,
        drop_tensors,
        change_progress,
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text('{"key": "key", "fi'),
        lambda folder: (folder / "state.json").write_text("null"),
        lambda folder: (folder / "state.json").write_text('{"key": "key", "file": "../secret"}'),
        lambda folder: None,
    ],
    ids=["flipped", "cut", "gone", "progress", "no index", "half index", "null", "outside", "other key"],
)
def test_a_damaged_state_or_one_of_another_stage_is_not_used(
    damage: Callable[[Path], object], bert: Bert, request: pytest.FixtureRequest
) -> None:
    bert = replace(bert, steps=4, config=replace_config(bert.config, evaluate_every=None))
    unbroken = bert.run(None, name="unbroken")
    other = request.node.callspec.id == "other key"
    with pytest.raises(KilledError):
        bert.run(3, key="another" if other else "key")
    damage(bert.folder / "state")
    assert ResumeState(bert.folder / "state", "key").load() is None
    assert equal(bert.run(None), unbroken)
    (said,) = bert.said
    assert said.startswith(f"t: cannot resume from {bert.folder / 'state'}: damaged, or written by another")


TENSORS = {"model.w": torch.arange(6.0).view(2, 3), "model.mask": torch.tensor([True, False])}


def test_a_state_comes_back(tmp_path: Path) -> None:
    progress = Progress(step=4, best=float("inf"), history=[{"step": 2.0, "pnr": float("inf")}])
    ResumeState(tmp_path / "s", "key").save(TENSORS, progress)
    loaded = ResumeState(tmp_path / "s", "key").load()
    assert loaded is not None
    assert loaded[1] == progress
    assert all(torch.equal(loaded[0][name], tensor) for name, tensor in TENSORS.items())
    ResumeState(tmp_path / "s", "key").save(TENSORS, Progress(step=6))
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["state.json", "step-6.safetensors"]
    assert ResumeState(tmp_path / "s", "other").load() is None
    assert ResumeState(tmp_path / "nowhere", "key").load() is None


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_save_leaves_the_last_state(
    call: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ResumeState(tmp_path / "s", "key")
    state.save(TENSORS, Progress(step=2))
    calls: list[int] = []

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        return fake

    if call == "write":
        monkeypatch.setattr(resume_state, "write_synced", failing(resume_state.write_synced))
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
    if call == "rename":
        monkeypatch.setattr(Path, "rename", failing(Path.rename))
    with pytest.raises(SqatError) as caught:
        state.save(TENSORS, Progress(step=4))
    assert str(caught.value) == (
        f"{tmp_path / 's'}: the mid-stage state cannot be written: No space left on device; free space"
    )
    assert not list((tmp_path / "s").glob(".*")), "nothing half-written stays"
    loaded = state.load()
    assert loaded is not None
    assert loaded[1].step == 2
