"""How many steps and rows fit into the minutes that a user gives: a few steps of the dense model are timed here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.checkpoint.store import Checkpoint
    from sqat.data.rows import SplitName
    from sqat.tasks.splits import Splits

# Shares of the time: training, the dev split after each stage, the test split of the results.
TRAINING, DEV, TEST = 0.7, 0.1, 0.15
DEV_PASSES, TEST_PASSES = 6, 3  # stages that measure dev, results that measure test
# In dense steps: one with a teacher costs 1.45 (recipes/BENCHMARKS.md), one of prune 0.4 more with its blocks.
COSTS = {"train": 1.0, "prune": 1.85, "qat": 1.45}
FORWARD = 1 / 3  # a forward pass costs a third of a step
SHARES = {"train": 0.5, "prune": 0.3, "qat": 0.2}  # of the steps
MOST_EPOCHS = {"train": 3, "prune": 6, "qat": 3}  # more time than that changes little
BLOCK_STEPS = 0.8  # of each block, to a step of prune
MOST_BLOCK_STEPS = 128
STAGE = "train"
LEAST_ROWS = 200  # of dev and test: fewer say nothing, however short the time
TIMED_STEPS = 4  # the first one warms up


@dataclass(frozen=True)
class Budget:
    """What fits: steps of each stage that trains, and the most rows of dev and test."""

    steps: Mapping[str, int]
    rows: Mapping[SplitName, int]


def plan_minutes(splits: Splits, minutes: float) -> Budget:
    """Plan steps and rows for a run of some minutes on this machine."""
    step, batch_rows, epoch_steps = time_step(splits)
    seconds = 60 * minutes
    dense_steps = seconds * TRAINING / step
    total = dense_steps / sum(share * COSTS[name] for name, share in SHARES.items())
    shares: dict[SplitName, float] = {"dev": DEV / DEV_PASSES, "test": TEST / TEST_PASSES}
    row = step * FORWARD / batch_rows
    rows = {name: max(LEAST_ROWS, int(seconds * share / row)) for name, share in shares.items()}
    steps = split_steps(int(total))
    return Budget({name: min(count, MOST_EPOCHS[name] * epoch_steps) for name, count in steps.items()}, rows)


def split_steps(total: int) -> dict[str, int]:
    """Split the steps of a run over its stages; each gets at least one."""
    return {name: max(1, round(share * total)) for name, share in SHARES.items()}


def block_steps(prune_steps: int) -> int:
    """Return the steps in which each block is reconstructed."""
    return max(1, min(MOST_BLOCK_STEPS, round(BLOCK_STEPS * prune_steps)))


def no_teacher() -> Checkpoint:
    """Stand in for the teacher that dense training does not load."""
    raise AssertionError("dense training has no teacher")


def time_step(splits: Splits) -> tuple[float, float, int]:
    """Time training steps of the recipe's dense model on its own rows.

    Returns:
        the seconds of a step, the mean rows of its batch, and the steps of an epoch.
    """
    import torch

    from sqat.progress import SilentReporter
    from sqat.recipe.stages import DenseTrainConfig
    from sqat.stages.context import StageContext
    from sqat.training.resume_state import ResumeState

    config = splits.recipe.stages[STAGE]
    assert isinstance(config, DenseTrainConfig)
    state = ResumeState(splits.folder / "unused", "")
    context = StageContext(STAGE, "", {}, splits, SilentReporter(), state, teacher=no_teacher)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        model, processor = context.load_model(None)
        model.train()
        batches = context.training_batches(config, processor)
        plan = batches.plan(0)
        seconds = []
        for rows in islice(cycle(plan), TIMED_STEPS):
            batch = batches.collate(rows).to(next(model.parameters()).device)
            begun = time.monotonic()
            splits.task.loss(model(**batch.inputs).logits, batch).backward()
            model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU still computes when the program goes on
            seconds.append(time.monotonic() - begun)
    return median(seconds[1:]), sum(map(len, plan)) / len(plan), len(plan)
