"""The one training loop: every stage that trains calls `fit`.

The whole run is a function of the seed: order of batches, dropout, noise. So a stopped run resumes to the same
weights, and several ranks compute what one would, but for the rounding of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sqat.distributed import any_rank, process_state, run_on_rank0, uses_fsdp
from sqat.errors import StoppedError
from sqat.progress import Reporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches, describe_sharing, iterate_steps
from sqat.training.data_parallel import REPLICAS, Loss, Objective, data_parallel
from sqat.training.fsdp import full_tensor, shard_like, summon_full_params
from sqat.training.health import check_scales, learned_amax, weak_layer_warnings
from sqat.training.metrics_log import MetricsLog
from sqat.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rate
from sqat.training.resume_state import Progress, ResumeState
from sqat.training.signals import catch_stop_signals
from sqat.training.step import take_step

CHECK_LAYERS_EVERY = 100  # steps

Metrics = dict[str, float]


@dataclass
class Evaluation:
    """How the dev split is measured: all metrics, and the one to maximise."""

    measure: Callable[[], Metrics]
    metric: str


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
    log: MetricsLog | None = None,
) -> TrainResult:
    """Train ``model`` in place for ``steps`` optimizer steps.

    Args:
        loss: weighted parts of the loss of one batch; their sum is minimised.
        state: where the unfinished training is saved; one of the same key is resumed.
        evaluation: runs every ``config.evaluate_every`` steps, and after the last one where the best step is kept.
        before_step: called before each step with its number; what it changes must be in the model's state dict.
        best_from_step: evaluations up to this step do not count for the best step and early stopping.
        log: gets the losses and metrics of every step.

    Raises:
        SqatError: NaN or Inf in a loss or gradient, or a learned scale that runs away.
        StoppedError: a signal stopped the training, which is saved.
    """
    process_state()  # before Accelerator, which would not find gloo by itself
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1,  # whatever the environment says
                              kwargs_handlers=[REPLICAS])  # fmt: skip
    accumulation_steps = resolve_accumulation_steps(config, state)
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
                rate = config.learning_rate * learning_rate_factor(config, progress.step, steps)
                set_learning_rate(optimizer, rate)
                progress.step += 1
                micro_batches, samples = next(work)
                progress.losses = take_step(parallel, optimizer, micro_batches, config, progress.step)
                check_scales(amax, start_amax, progress.step)
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
        run.keep_best()
    return TrainResult(progress.step, progress.seconds, progress.samples, progress.losses, progress.history)


def resolve_accumulation_steps(config: TrainConfig, state: ResumeState) -> int:
    """Return how many batches an optimizer step sums up over all ranks; a resumed training keeps its number."""
    resumed = state.peek()
    if resumed is not None:
        return resumed.accumulation_steps
    return config.gradient_accumulation * int(process_state().num_processes)


def start_or_resume(run: TrainingRun, title: str, steps: int, config: TrainConfig, reporter: Reporter) -> None:
    """Load the resume state where there is one, and report where training starts and how ranks share it."""
    sharing = describe_sharing(run.progress.accumulation_steps, config.gradient_accumulation)
    has_state = run.state.directory.exists()
    if run.resume():
        reporter.info(f"{title}: resumed at step {run.progress.step} of {steps}{sharing and f'; {sharing}'}")
    elif has_state:
        reporter.info(f"{title}: cannot resume from {run.state.directory}: damaged, or written by another "
                      "configuration; restarting the stage")  # fmt: skip
    if sharing and not run.progress.step:
        reporter.info(f"{title}: {sharing}")
    reporter.start(title, steps)


def evaluation_due(config: TrainConfig, step: int, steps: int) -> bool:
    """Say whether dev is measured after a step."""
    if config.evaluate_every is None:
        return False
    return step % config.evaluate_every == 0 or (step == steps and config.keep_checkpoint == "best")


def is_stopped_early(progress: Progress, config: TrainConfig) -> bool:
    """Say whether too many evaluations in a row brought no improvement."""
    return config.early_stopping is not None and progress.evals_without_improvement >= config.early_stopping


@dataclass
class TrainingRun:
    """A training under way: what is saved, resumed and finally kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: ResumeState
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def save(self) -> None:
        """Write model, optimizer and best weights on rank 0; every rank must call this.

        Raises:
            SqatError: they cannot be written; on every rank.
        """
        tensors = self.tensors() if uses_fsdp() or process_state().is_main_process else {}
        run_on_rank0(lambda: self.state.save(tensors, self.progress))

    def tensors(self) -> dict[str, Tensor]:
        """Return model, optimizer and best weights by name, whole; with FSDP every rank must call this."""
        with summon_full_params(self.model):
            tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, values in sorted(self.optimizer.state_dict()["state"].items()):  # in one order on all ranks
            moments = {name: value for name, value in sorted(values.items()) if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": full_tensor(value) for name, value in moments.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def resume(self) -> bool:
        """Load the resume state; False where there is none of this key."""
        loaded = self.state.take()
        if loaded is None:
            return False
        tensors, self.progress = loaded
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        with summon_full_params(self.model):
            self.model.load_state_dict(parts["model"])
        self.best = parts["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for name, tensor in parts["optimizer"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = shard_like(weights[int(index)], tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return True

    def evaluate(self, evaluation: Evaluation, config: TrainConfig, best_from_step: int) -> Metrics:
        """Measure dev, keep the best weights where they are wanted, and count evaluations without improvement."""
        progress = self.progress
        with summon_full_params(self.model):
            metrics = evaluation.measure()
            self.model.train()
            progress.history.append({"step": float(progress.step), **metrics})
            if progress.step <= best_from_step:
                return metrics
            if metrics[evaluation.metric] > progress.best:
                progress.best, progress.evals_without_improvement = metrics[evaluation.metric], 0
                if config.keep_checkpoint == "best":
                    self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            else:
                progress.evals_without_improvement += 1
        return metrics

    def warn_of_weak_layers(self, title: str, reporter: Reporter) -> None:
        """Report dead layers and rows of zeros, each kind once."""
        with summon_full_params(self.model):
            warnings = weak_layer_warnings(self.model, self.progress.step)
        for kind, line in warnings.items():
            if kind not in self.reported:
                reporter.info(f"{title}: {line}")
            self.reported.add(kind)

    def keep_best(self) -> None:
        """Load the best weights where they were kept, and leave the model in evaluation mode."""
        if self.best:
            with summon_full_params(self.model):
                self.model.load_state_dict(self.best)
        self.model.eval()
