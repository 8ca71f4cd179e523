"""The training loop against a plain one: precision, learning rates, accumulation, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.progress import SilentReporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches
from sqat.training.loop import TrainResult, fit
from sqat.training.optimizer import learning_rate_factor, make_optimizer
from sqat.training.resume import Evaluation
from sqat.training.resume_state import ResumeState
from sqat.training.step import autocast
from tests.errors import raises_code
from tests.training.comparing import equal, replace_config, weights


def attend(precision: str) -> tuple[Tensor, Tensor]:
    """Attention over a product, as a loss of float32 inputs, and its gradient."""
    torch.manual_seed(0)
    weight = torch.randn(2, 4, 16, 8, requires_grad=True)
    with autocast(precision, torch.device("cpu")):
        out = nn.functional.scaled_dot_product_attention(weight, weight @ torch.eye(8), weight)
    loss = out.float().square().mean()
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def test_bf16_computes_what_fp32_does_within_its_eight_bits() -> None:
    (exact, slope), (rounded, rounded_slope) = attend("fp32"), attend("bf16")
    assert rounded == pytest.approx(exact.item(), rel=2e-2)
    assert rounded != exact
    assert (rounded_slope - slope).norm() < 3e-2 * slope.norm()


def test_bf16_on_a_cpu_is_without_the_fused_attention_and_leaves_the_switches_alone() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with autocast("bf16", torch.device("cpu")):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert not torch.is_autocast_enabled("cpu")


def factors(steps: int, **config: Any) -> list[float]:
    return [learning_rate_factor(TrainConfig(**config), step, steps) for step in range(steps)]


def test_learning_rates() -> None:
    linear = factors(10, warmup=0.2, lr_schedule="linear")
    assert linear == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert factors(4, warmup=0.5, lr_schedule="constant") == [0.5, 1, 1, 1]
    cosine = factors(6, warmup=0.0, lr_schedule="cosine")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert factors(1, warmup=0.9) == [1]
    assert factors(3, warmup=0.0) == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("config", "batches", "together", "wanted"),
    [
        ({"steps": 7}, 100, 4, 7),
        ({}, 100, 1, 100),
        ({"epochs": 0.5}, 5, 1, 3),
        ({"epochs": 2}, 10, 4, 5),
        ({"epochs": 1}, 10, 8, 2),
        ({"epochs": 0.001}, 10, 1, 1),
    ],
)
def test_steps_of_a_fit(config: dict[str, Any], batches: int, together: int, wanted: int) -> None:
    assert TrainConfig(**config).total_steps(batches, together) == wanted


def test_biases_and_norms_are_not_decayed() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    net[0].weight.requires_grad_(False)
    net.bound = nn.Parameter(torch.tensor(1.0))
    net.embedding = nn.Embedding(2, 3)
    decayed, plain = make_optimizer(net, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert [p is net.embedding.weight for p in decayed["params"]] == [True]
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 4
    sgd = make_optimizer(net, TrainConfig(optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.9


@dataclass
class Small:
    """Rows (x, y), a net, and all that a fit of it needs."""

    folder: Path
    x: Tensor
    y: Tensor

    def net(self, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))

    def batches(self, batch_size: int) -> Batches:
        def plan(epoch: int) -> list[list[int]]:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch)).tolist()
            return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

        return Batches(plan, lambda rows: Batch({"x": self.x[rows]}, self.y[rows], torch.full((len(rows),), -1)))

    def fit(self, net: nn.Module, config: TrainConfig, steps: int, **more: Any) -> TrainResult:
        known = {
            "seed": 5,
            "title": "small",
            "reporter": SilentReporter(),
            "state": ResumeState(self.folder / "state", "key"),
        }
        return fit(net, self.loss, self.batches(config.batch_size), config, steps=steps, **{**known, **more})

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        error = model(batch.inputs["x"]).squeeze(1) - batch.labels
        return {"square": error.square().mean(), "small": 0.1 * error.abs().mean()}


@pytest.fixture
def small(tmp_path: Path) -> Small:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return Small(tmp_path, x, x.sum(1).sin())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fit_is_the_plain_loop(optimizer: str, small: Small) -> None:
    config = TrainConfig(
        batch_size=8, optimizer=optimizer, learning_rate=0.02, warmup=0.4, weight_decay=0.1, max_grad_norm=0.05
    )
    ours, theirs = small.net(), small.net()
    small.fit(ours, config, 5)
    groups = [{"params": [p for p in theirs.parameters() if (p.dim() > 1) is wide]} for wide in (True, False)]
    for group, decay in zip(groups, (0.1, 0.0), strict=True):
        group["weight_decay"] = decay
    updater = torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, lr=1, momentum=0.9)
    plan = [*small.batches(8).plan(0), *small.batches(8).plan(1)]
    for rows, factor in zip(plan[:5], (0.5, 1, 1, 2 / 3, 1 / 3), strict=True):
        for group in updater.param_groups:
            group["lr"] = 0.02 * factor
        error = theirs(small.x[rows]).squeeze(1) - small.y[rows]
        (error.square().mean() + 0.1 * error.abs().mean()).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        updater.step()
        updater.zero_grad()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not ours.training


def test_accumulation_is_a_bigger_batch(small: Small) -> None:
    known = {"learning_rate": 0.05, "optimizer": "sgd", "max_grad_norm": None}
    big, small_ones = small.net(), small.net()
    small.fit(big, TrainConfig(batch_size=12, **known), 4, state=ResumeState(small.folder / "a", "k"))
    fitted = small.fit(small_ones, TrainConfig(batch_size=4, gradient_accumulation=3, **known), 4)
    assert fitted.samples == 48
    for a, b in zip(weights(big), weights(small_ones), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    once = small.net()
    small.fit(once, TrainConfig(batch_size=4, **known), 4, state=ResumeState(small.folder / "b", "k"))
    assert not torch.allclose(weights(once)[0], weights(big)[0], rtol=1e-3)


def test_the_display_is_told_every_step(small: Small, recorder: Any) -> None:
    config = TrainConfig(batch_size=8, evaluate_every=2, learning_rate=1e-9)
    dev = Evaluation(lambda: {"score": 0.25}, "score")
    net = small.net()
    fitted = small.fit(net, config, 3, reporter=recorder, evaluation=dev)
    rows = small.batches(8).plan(0)[0]
    first = {n: part.item() for n, part in small.loss(net, small.batches(8).collate(rows)).items()}
    assert recorder.bars == [("small", 3)]
    assert recorder.ended == 1
    assert [step for step, _ in recorder.updates] == [1, 2, 3]
    assert recorder.updates[0][1] == pytest.approx(first, rel=1e-4)
    assert set(recorder.updates[1][1]) == {"square", "small", "score"}
    assert fitted.steps == 3
    assert fitted.samples == 24
    assert fitted.history == [{"step": 2.0, "score": 0.25}]


def test_epochs_follow_each_other(small: Small) -> None:
    batches = small.batches(10)
    whole = [batch for epoch in range(4) for batch in batches.plan(epoch)]
    for start in range(8):
        stream = batches.stream(start)
        assert [next(stream) for _ in range(4)] == whole[start : start + 4]
    with pytest.raises(SqatError, match="no batch of training rows is left"):
        next(Batches(lambda epoch: [], batches.collate).stream(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_fit(value: float, small: Small) -> None:
    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        counted.append(1)
        parts = small.loss(model, batch)
        return {**parts, "minilm": parts["small"] * (value if len(counted) == 3 else 1.0)}

    counted: list[int] = []
    config = TrainConfig(batch_size=8, save_every=0)
    with pytest.raises(SqatError) as caught:
        fit(small.net(), loss, small.batches(8), config, steps=6, seed=0, title="t", reporter=SilentReporter(),
            state=ResumeState(small.folder / "state", "key"))  # fmt: skip
    assert str(caught.value) == f"the minilm loss is {value} at step 3; lower learning_rate, or look at the data"
    loaded = ResumeState(small.folder / "state", "key").load()
    assert loaded is not None
    assert loaded[1].step == 2, "the last sound state stays"
    assert all(tensor.isfinite().all() for name, tensor in loaded[0].items() if name.startswith("model."))


def scores(*values: float) -> Evaluation:
    left = list(values)
    return Evaluation(lambda: {"score": left.pop(0), "other": 1.0}, "score")


def test_early_stopping(small: Small) -> None:
    config = TrainConfig(batch_size=8, evaluate_every=1, early_stopping=2)
    fitted = small.fit(small.net(), config, 10, evaluation=scores(0.1, 0.3, 0.3, 0.2, 0.9))
    assert fitted.steps == 4
    assert [figures["score"] for figures in fitted.history] == [0.1, 0.3, 0.3, 0.2]
    again = small.fit(small.net(), config, 5, evaluation=scores(0.1, 0.3, 0.3, 0.4, 0.3))
    assert again.steps == 5


@pytest.mark.parametrize(("keep", "kept"), [("best", 4), ("last", 6)])
def test_the_best_or_the_last_weights_are_kept(keep: str, kept: int, small: Small) -> None:
    config = TrainConfig(
        batch_size=8, evaluate_every=2, keep_checkpoint=keep, learning_rate=0.05, lr_schedule="constant", warmup=0
    )
    net, at = small.net(dropout=0.3), {}
    values = [0.1, 0.4, 0.2]

    def measure() -> dict[str, float]:
        at[2 * len(at) + 2] = weights(net)
        net.eval()
        torch.rand(3)
        return {"score": values[len(at) - 1]}

    small.fit(net, config, 6, evaluation=Evaluation(measure, "score"))
    assert equal(weights(net), at[kept])
    undisturbed = small.net(dropout=0.3)
    small.fit(
        undisturbed, replace_config(config, keep_checkpoint="last"), 6, state=ResumeState(small.folder / "b", "k")
    )
    assert equal(weights(undisturbed), at[6]), "measuring changes neither dropout nor order"


def test_ema_returns_the_running_mean_of_the_weights_after_the_last_mask(small: Small) -> None:
    config = TrainConfig(batch_size=8, evaluate_every=1, learning_rate=0.05, ema=0.7)
    net, seen = small.net(), list[list[Tensor]]()

    def measure() -> dict[str, float]:
        seen.append(weights(net))
        return {"score": 0.0}

    small.fit(net, config, 8, evaluation=Evaluation(measure, "score"), best_from_step=2)
    for number, weight in enumerate(weights(net)):
        steps = [each[number].double() for each in seen[2:]]
        mean = sum(steps[:3]) / 3  # of 1, 2 and 3 steps the plain mean, as 1/3 > 1 - 0.7
        for step in steps[3:]:
            mean = 0.7 * mean + 0.3 * step
        torch.testing.assert_close(weight.double(), mean)
        assert not torch.equal(weight, seen[-1][number])


def test_ema_and_shards_exclude_each_other(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqat.training.loop.uses_fsdp", lambda: True)
    with raises_code("recipe-conflict", "set ema: null"):
        small.fit(small.net(), TrainConfig(batch_size=8, ema=0.9), 1)


def test_the_last_step_is_among_the_best(small: Small) -> None:
    config = TrainConfig(batch_size=8, evaluate_every=2, keep_checkpoint="best", learning_rate=0.05)
    net = small.net()
    fitted = small.fit(net, config, 5, evaluation=scores(0.1, 0.2, 0.9))
    assert [figures["step"] for figures in fitted.history] == [2, 4, 5]
    last = small.net()
    config = replace_config(config, keep_checkpoint="last")
    small.fit(last, config, 5, state=ResumeState(small.folder / "b", "k"), evaluation=None)
    assert equal(weights(net), weights(last))


def test_no_step_before_the_last_mask_is_judged(small: Small) -> None:
    config = TrainConfig(batch_size=8, evaluate_every=1, keep_checkpoint="best", early_stopping=2, learning_rate=0.05)
    net, seen = small.net(), []
    values = iter([0.9, 0.8, 0.7, 0.1, 0.2, 0.15])

    def measure() -> dict[str, float]:
        seen.append(weights(net))
        return {"score": next(values)}

    fitted = small.fit(net, config, 6, evaluation=Evaluation(measure, "score"), best_from_step=3)
    assert fitted.steps == 6
    assert equal(weights(net), seen[4])
