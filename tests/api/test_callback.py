"""`sqat.SparseCallback` in a real `transformers.Trainer`: masks on time, plain weights at the end, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import sqat
from tests.api.conftest import assert_pruned, copy_weights
from tests.errors import raises_code
from tests.tiny import VOCABULARY, MakeModel

STEPS = 8


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Thirty-two rows whose label is whether the second token is large."""

    def __init__(self) -> None:
        self.ids = torch.randint(5, len(VOCABULARY), (32, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[1] > 30).long()}


class Zeros(TrainerCallback):  # type: ignore[misc]
    """Notes the share of zeros in the first layer's weight at each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weight = model.bert.encoder.layer[0].attention.self.query.weight
        self.seen.append(float((weight == 0).float().mean()))


def make_trainer(model: Any, folder: Path, *callbacks: Any, **arguments: Any) -> Trainer:
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
                "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip
    return Trainer(model, Arguments(output_dir=str(folder), **{**settings, **arguments}), train_dataset=Rows(),
                   eval_dataset=Rows(), callbacks=[*callbacks])  # fmt: skip


def test_it_prunes_over_the_trainers_steps_and_leaves_plain_weights(make_model: MakeModel, tmp_path: Path) -> None:
    model, zeros = make_model(), Zeros()
    callback = sqat.SparseCallback(model, recovery_fraction=0.5)
    trainer = make_trainer(model, tmp_path, callback, zeros, gradient_accumulation_steps=2)
    dense = copy_weights(model, callback.masks)
    trainer.train()
    assert zeros.seen == [0.25] * 4 + [0.5] * 4
    assert_pruned(model, callback.masks)
    assert len(callback.masks.kept) == 12
    assert all(not torch.equal(model.get_submodule(name).weight, weight) for name, weight in dense.items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with raises_code("usage"):
        trainer.train()


@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_is_the_uninterrupted_one(make_model: MakeModel, tmp_path: Path, stop: int) -> None:
    """Stopped before and after the last masks, at a checkpoint of the Trainer."""
    finished = []
    saving = {"save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "whole" / f"checkpoint-{stop}")):
        model, zeros = make_model(), Zeros()
        callback = sqat.SparseCallback(model, recovery_fraction=0.5)
        folder = tmp_path / ("whole" if resume is None else "resumed")
        make_trainer(model, folder, callback, zeros, **saving).train(resume_from_checkpoint=resume)
        assert_pruned(model, callback.masks)
        finished.append((model.state_dict(), zeros.seen))
    (whole, seen), (resumed, rest) = finished
    assert rest == seen[stop:]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("schedule", ["per-group", "group-fraction"])
def test_the_trainers_checkpoints_are_plain_pruned_models(make_model: MakeModel, tmp_path: Path, schedule: str) -> None:
    """`from_pretrained` finds every weight, and the zeros grow from checkpoint to checkpoint."""
    model = make_model()
    callback = sqat.SparseCallback(model, schedule=schedule, recovery_fraction=0.5)
    make_trainer(model, tmp_path, callback, save_strategy="steps", save_steps=2).train()
    shares = []
    for step in range(2, STEPS + 1, 2):
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"checkpoint-{step}", output_loading_info=True
        )
        assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        weights = torch.cat([loaded.get_submodule(name).weight.detach().flatten() for name in callback.masks.kept])
        shares.append(float((weights == 0).float().mean()))
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    state, plain = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())


def test_a_checkpoint_without_masks_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_trainer(make_model(), tmp_path, save_strategy="steps", save_steps=4).train()
    model = make_model()
    trainer = make_trainer(model, tmp_path, sqat.SparseCallback(model, recovery_fraction=0.5))
    with raises_code("damaged-checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Broken(TrainerCallback):  # type: ignore[misc]
    """Fails in the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyError("the user's own")


def test_the_pruner_gives_plain_weights_back_after_train_raises(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    callback = sqat.SparseCallback(model, recovery_fraction=0.5)
    with pytest.raises(KeyError, match="the user's own"):
        make_trainer(model, tmp_path, callback, Broken()).train()
    callback.pruner.remove()
    assert not any("parametrizations" in name for name in model.state_dict())
    assert_pruned(model, sqat.prune(model))


def test_too_few_steps_are_a_warning_once_the_trainer_knows_them(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    callback = sqat.SparseCallback(model)
    with pytest.warns(UserWarning, match="too few steps before the last mask: 1 of 2 masks are skipped"):
        make_trainer(model, tmp_path, callback, max_steps=2).train()
    assert_pruned(model, callback.masks)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops after two steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_run_that_stops_early_is_pruned_at_the_end_and_warns(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    callback = sqat.SparseCallback(model, recovery_fraction=0.5)
    trainer = make_trainer(model, tmp_path, callback, Stop())
    with pytest.warns(UserWarning, match="before the last masks of step 4: they are set now"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert_pruned(model, callback.masks)


def test_a_best_checkpoint_from_before_the_last_masks_is_pruned(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    callback = sqat.SparseCallback(model, recovery_fraction=0.5)
    patience = EarlyStoppingCallback(early_stopping_patience=99)
    trainer = make_trainer(model, tmp_path, callback, patience, save_strategy="steps", save_steps=2, eval_steps=2,
                           eval_strategy="steps", load_best_model_at_end=True, learning_rate=1.0)  # fmt: skip
    with pytest.warns(UserWarning, match="or the best checkpoint was written, before the last masks"):
        trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith(("checkpoint-2", "checkpoint-4"))
    assert_pruned(model, callback.masks)


def test_criteria_with_statistics_and_functions(make_model: MakeModel, tmp_path: Path) -> None:
    rows = Rows()
    batch = {key: torch.stack([rows[i][key] for i in range(8)]) for key in rows[0]}
    found = []
    for criterion in ("wanda", lambda weight: weight.abs()):
        model = make_model()
        callback = sqat.SparseCallback(model, criterion=criterion, batches=[batch], schedule="group-fraction")
        make_trainer(model, tmp_path, callback, max_steps=5).train()
        assert_pruned(model, callback.masks)
        found.append(torch.cat([mask.flatten() for mask in callback.masks.kept.values()]))
    assert not torch.equal(*found)
