"""The one training loop: every stage that trains calls `fit`.

The whole run is a function of the seed: order of batches, dropout, noise. So a stopped run resumes to the same
weights, and several ranks compute what one would, but for the rounding of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from sqat.distributed import any_rank, process_state, uses_fsdp
from sqat.errors import SqatError, StoppedError
from sqat.progress import Reporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches, iterate_steps
from sqat.training.data_parallel import REPLICAS, Loss, Objective, data_parallel
from sqat.training.health import check_scales, learned_amax
from sqat.training.metrics_log import MetricsLog
from sqat.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rate
from sqat.training.resume import Evaluation, Metrics, TrainingRun, resolve_accumulation_steps, start_or_resume
from sqat.training.resume_state import Progress, ResumeState
from sqat.training.signals import catch_stop_signals
from sqat.training.step import take_step

CHECK_LAYERS_EVERY = 100  # steps


@dataclass(frozen=True)
class TrainResult:
    """What a training did: optimizer steps, seconds, samples, the last step's loss parts, dev metrics on the way."""

    steps: int
    seconds: float
    samples: int
    losses: Metrics
    history: list[Metrics]


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    config: TrainConfig,
    *,
    steps: int,
    seed: int,
    title: str,
    reporter: Reporter,
    state: ResumeState,
    evaluation: Evaluation | None = None,
    before_step: Callable[[int], None] | None = None,
    best_from_step: int = 0,
    lr_period: int | None = None,
    save_end: bool = False,
    log: MetricsLog | None = None,
) -> TrainResult:
    """Train ``model`` in place for ``steps`` optimizer steps.

    Args:
        loss: weighted parts of the loss of one batch; their sum is minimised.
        state: where the unfinished training is saved; one of the same key is resumed.
        evaluation: runs every ``config.evaluate_every`` steps, and after the last one where the best step is kept.
        before_step: called before each step with its number; what it changes must be in the model's state dict.
        best_from_step: evaluations up to this step do not count for the best step and early stopping, and the running
            mean of the weights starts after it.
        lr_period: steps after which the learning rate starts anew; default: all steps.
        save_end: save the state after the last step too, for a stage that goes on from there.
        log: gets the losses and metrics of every step.

    Raises:
        SqatError: NaN or Inf in a loss or gradient, or a learned scale that runs away.
        StoppedError: a signal stopped the training, which is saved.
    """
    if config.ema is not None and uses_fsdp():
        raise SqatError("ema averages whole weights, which FSDP splits between processes",
                        "set ema: null, or start without --use_fsdp", code="recipe-conflict")  # fmt: skip
    process_state()  # before Accelerator, which would not find gloo by itself
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1,  # whatever the environment says
                              kwargs_handlers=[REPLICAS])  # fmt: skip
    accumulation_steps, period = resolve_accumulation_steps(config, state), lr_period or steps
    with data_parallel(Objective(model, loss), accelerator) as parallel:
        optimizer = make_optimizer(model, config)
        run = TrainingRun(model, optimizer, state, Progress(accumulation_steps=accumulation_steps))
        start_or_resume(run, title, steps, config, reporter)
        progress, shown = run.progress, dict(run.progress.losses)
        work = iterate_steps(batches, accumulation_steps, seed, accelerator.device, progress.step)
        amax = learned_amax(model)
        start_amax = {site: float(value.detach()) for site, value in amax.items()}
        model.train()
        last_saved, stop = time.monotonic(), False
        with catch_stop_signals() as stop_requested:
            while not stop and progress.step < steps and not is_stopped_early(progress, config):
                started = time.monotonic()
                if before_step is not None:
                    before_step(progress.step)
                rate = config.learning_rate * learning_rate_factor(config, progress.step % max(1, period), period)
                set_learning_rate(optimizer, rate)
                progress.step += 1
                micro_batches, samples = next(work)
                progress.losses = take_step(parallel, optimizer, micro_batches, config, progress.step)
                check_scales(amax, start_amax, progress.step)
                if config.ema is not None and progress.step > best_from_step:
                    run.average(config.ema, progress.step - best_from_step)
                progress.samples += samples
                step_seconds = time.monotonic() - started
                if progress.step % CHECK_LAYERS_EVERY == 0 or progress.step == steps:
                    run.warn_of_weak_layers(title, reporter)
                dev = None
                if evaluation is not None and evaluation_due(config, progress.step, steps):
                    dev = run.evaluate(evaluation, config, best_from_step)
                progress.seconds += time.monotonic() - started
                shown |= {**progress.losses, **(dev or {})}
                reporter.advance(progress.step, shown, samples / max(step_seconds, 1e-9))  # some clocks stand still
                if log is not None and accelerator.is_main_process:
                    log.write(progress.step, progress.losses, rate, dev)
                save = accelerator.is_main_process and time.monotonic() - last_saved >= config.save_every
                stop, save = any_rank(stop_requested(), save)
                if save and not stop and progress.step < steps:
                    last_saved = time.monotonic()
                    run.save()
            if any(any_rank(stop_requested())):  # once more: a signal may have come during the last save
                run.save()
                accelerator.wait_for_everyone()  # a launcher ends all ranks once the first has ended
                raise StoppedError(f"{title}: stopped and saved at step {progress.step} of {steps}",
                                   "run the same command without --force to resume", code="stopped")  # fmt: skip
        reporter.finish()
        if save_end:
            run.save()
        run.keep_chosen()
    return TrainResult(progress.step, progress.seconds, progress.samples, progress.losses, progress.history)


def evaluation_due(config: TrainConfig, step: int, steps: int) -> bool:
    """Say whether dev is measured after a step: every ``evaluate_every``, and the last if the best is kept."""
    if config.evaluate_every is None:
        return False
    return step % config.evaluate_every == 0 or (step == steps and config.keep_checkpoint == "best")


def is_stopped_early(progress: Progress, config: TrainConfig) -> bool:
    """Say whether too many evaluations in a row brought no improvement."""
    return config.early_stopping is not None and progress.evals_without_improvement >= config.early_stopping
