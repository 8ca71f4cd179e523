"""The one training loop, on Accelerate: every stage that trains goes through `fit`.

The caller gives a loss (a dict of weighted parts) and, where it changes the model between steps, a
`before_step`. The learning rate is a function of the step; the order of batches, what is drawn for them (dropout,
noise, crops) and so the whole run are functions of the seed and the number of a batch. So a run stopped at any step
continues from its last mid-stage state to the same weights (bit for bit on a CPU with one thread), and processes that
share the batches of a step compute what one would that takes them all, but for the rounding of sums. How many batches
a step sums up is settled when a run begins; one that is gone on with in more or fewer processes keeps to it.
The batches come from `sqat.training.batches`, are shared out by `sqat.training.data_parallel`, and what is saved is
`sqat.training.resume_state`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sqat.distributed import all_reduce_sum, any_rank, process_state, run_on_rank0, uses_fsdp
from sqat.errors import StoppedError
from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.progress import Reporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches, MicroBatch, describe_sharing, iterate_steps, seed_torch
from sqat.training.data_parallel import REPLICAS, Loss, Norms, Objective, ParallelModel, data_parallel
from sqat.training.fsdp import full_tensor, shard_like, summon_full_params
from sqat.training.health import check_gradients, check_losses, check_scales, learned_bounds, weakness
from sqat.training.resume_state import Progress, ResumeState
from sqat.training.signals import catch_stop_signals

REMARK_EVERY = 100  # steps


Metrics = dict[str, float]


@dataclass
class Evaluation:
    """How the dev split is measured: a figure to maximise among all figures."""

    measure: Callable[[], Metrics]
    metric: str


@dataclass(frozen=True)
class TrainResult:
    """What a fit did: optimizer steps, seconds, samples, the last step's loss parts, the dev figures on the way."""

    steps: int
    seconds: float
    samples: int
    losses: Metrics
    history: list[Metrics]


def resolve_accumulation_steps(config: TrainConfig, state: ResumeState) -> int:
    """How many batches an optimizer step sums up over all processes: as many as the fit that is gone on with had."""
    known = state.peek()
    return config.gradient_accumulation * process_state().num_processes if known is None else known.accumulation_steps


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step (from 0) as a share of the peak: linear warm-up, then the recipe's decay to 0."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "constant":
        return 1.0
    return 1 - share if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; biases, norms and learned bounds are not decayed.

    A learned bound is amax = 127 s; under Adam, whose steps do not grow with the gradient, 127 times the rate moves s
    as LSQ means it (arXiv:1902.08153). ``factor`` is a group's share of the learning rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bounds = [p for name, p in named if name.startswith(f"{QUANTIZERS}.")]
    others = [p for name, p in named if not name.startswith(f"{QUANTIZERS}.")]
    adam = config.optimizer == "adamw"
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": bounds, "weight_decay": 0.0, "factor": 127.0 if adam else 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)  # a sixth of the time of the default here


@dataclass
class Run:
    """One fit under way: what is saved, resumed and finally kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: ResumeState
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    remarked: set[str] = field(default_factory=set)

    def save(self) -> None:
        """Let the first process write model, optimizer and best weights as one mid-stage state; all must call it.

        Raises:
            SqatError: it cannot be written; in all processes.
        """
        tensors = self.tensors() if uses_fsdp() or process_state().is_main_process else {}
        run_on_rank0(lambda: self.state.save(tensors, self.progress))

    def tensors(self) -> dict[str, Tensor]:
        """Model, optimizer and best weights by name; where they are shared out all processes must ask."""
        with summon_full_params(self.model):
            tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, values in sorted(self.optimizer.state_dict()["state"].items()):  # in one order in all processes
            known = {name: value for name, value in sorted(values.items()) if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": full_tensor(value) for name, value in known.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def resume(self) -> bool:
        """Go on from the mid-stage state, if a sound one of this key is there."""
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
        """Measure dev, remember the best weights where they are to be kept, count evaluations without gain."""
        with summon_full_params(self.model):
            return self.judge(evaluation.measure(), evaluation.metric, config, best_from_step)

    def judge(self, figures: Metrics, metric: str, config: TrainConfig, best_from_step: int) -> Metrics:
        """Note what was measured of the model as it stands; returns that."""
        self.model.train()
        self.progress.history.append({"step": float(self.progress.step), **figures})
        if self.progress.step <= best_from_step:
            return figures
        if figures[metric] > self.progress.best:
            self.progress.best = figures[metric]
            self.progress.evals_without_improvement = 0
            if config.keep_checkpoint == "best":
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        else:
            self.progress.evals_without_improvement += 1
        return figures

    def remark(self, title: str, reporter: Reporter) -> None:
        """Tell once of each kind what has become weak in the model."""
        with summon_full_params(self.model):
            found = weakness(self.model, self.progress.step)
        for kind, line in found.items():
            if kind not in self.remarked:
                reporter.info(f"{title}: {line}")
            self.remarked.add(kind)

    def finish(self) -> None:
        """Put the best weights back, where they were kept."""
        if self.best:
            with summon_full_params(self.model):
                self.model.load_state_dict(self.best)
        self.model.eval()


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
) -> TrainResult:
    """Train ``model`` in place for ``steps`` optimizer steps.

    Args:
        loss: weighted parts of the loss of one batch; their sum is minimised.
        state: where the mid-stage state is kept; an unfinished run of the same key goes on from it.
        evaluation: measured every ``config.evaluate_every`` steps, where that is set; after the last one too where
            the best step's weights are kept, so that it is among those compared.
        before_step: called before each step with its number; what it changes in the model must be in the
            model's state dict, so that a resumed run finds it there.
    """
    process_state()  # before Accelerator, which would not find gloo by itself
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1,  # whatever the environment says
                              kwargs_handlers=[REPLICAS])  # fmt: skip
    accumulation_steps = resolve_accumulation_steps(config, state)
    with data_parallel(Objective(model, loss), accelerator) as parallel:
        optimizer = make_optimizer(model, config)
        run = Run(model, optimizer, state, Progress(accumulation_steps=accumulation_steps))
        begin(run, title, steps, config, reporter)
        work = iterate_steps(batches, accumulation_steps, seed, accelerator.device, run.progress.step)
        bounds = learned_bounds(model)
        start = {site: float(bound.detach()) for site, bound in bounds.items()}
        model.train()
        shown, saved = dict(run.progress.losses), time.monotonic()
        stop = False
        with catch_stop_signals() as asked:
            while not stop and run.progress.step < steps and not stopped_early(run.progress, config):
                begun = time.monotonic()
                if before_step is not None:
                    before_step(run.progress.step)
                factor = rate_factor(config, run.progress.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["factor"] * config.learning_rate * factor
                run.progress.step += 1
                micro_batches, samples = next(work)
                run.progress.losses = take_step(parallel, optimizer, micro_batches, config, run.progress.step)
                check_scales(bounds, start, run.progress.step)
                run.progress.samples += samples
                seconds = time.monotonic() - begun
                shown |= run.progress.losses
                if run.progress.step % REMARK_EVERY == 0 or run.progress.step == steps:
                    run.remark(title, reporter)
                if evaluation is not None and evaluation_due(config, run.progress.step, steps):
                    shown |= run.evaluate(evaluation, config, best_from_step)
                run.progress.seconds += time.monotonic() - begun
                reporter.advance(run.progress.step, shown, samples / max(seconds, 1e-9))  # some clocks stand still
                due = accelerator.is_main_process and time.monotonic() - saved >= config.save_every
                stop, due = any_rank(asked(), due)
                if due and not stop and run.progress.step < steps:
                    saved = time.monotonic()
                    run.save()
            if any(any_rank(asked())):  # once more: a signal may have come during the last save
                run.save()
                accelerator.wait_for_everyone()  # a launcher ends all processes once the first has ended
                raise StoppedError(f"{title}: stopped and saved at step {run.progress.step} of {steps}",
                                   "the same command, without --force, goes on from there")  # fmt: skip
        reporter.finish()
        run.finish()
    done = run.progress
    return TrainResult(done.step, done.seconds, done.samples, done.losses, done.history)


def begin(run: Run, title: str, steps: int, config: TrainConfig, reporter: Reporter) -> None:
    """Go on from the mid-stage state where there is one, and say what is done and by how many processes."""
    sharing, there = (
        describe_sharing(run.progress.accumulation_steps, config.gradient_accumulation),
        run.state.directory.exists(),
    )
    if run.resume():
        reporter.info(f"{title}: resumed at step {run.progress.step} of {steps}{sharing and f'; {sharing}'}")
    elif there:
        reporter.info(f"{title}: the mid-stage state is damaged, or of another run or length: starting afresh")
    if sharing and not run.progress.step:
        reporter.info(f"{title}: {sharing}")
    reporter.start(title, steps)


def take_step(
    parallel: ParallelModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    config: TrainConfig,
    step: int,
) -> Metrics:
    """One optimizer step over its batches; returns the mean loss parts over those of all processes.

    Raises:
        SqatError: a loss or a gradient is no number; no weight has moved then, in any process.
    """
    totals: dict[str, Tensor] = {}
    model, norms = parallel.objective.model, Norms(parallel.objective.model)
    device, world = parallel.accelerator.device, parallel.accelerator.num_processes
    for index, micro_batch in enumerate(micro_batches):
        sync = parallel.no_sync() if index + 1 < len(micro_batches) else nullcontext()
        seed_torch(*micro_batch.seeds)
        with sync:
            with reduced(config.precision, device):
                parts = parallel.called(micro_batch.batch)
            weight = micro_batch.share * world  # gradients are averaged over the processes
            parallel.accelerator.backward(torch.stack([*parts.values()]).sum() * weight)
        norms.accumulate_(micro_batch.share)
        for name, part in parts.items():
            totals[name] = totals.get(name, part.new_zeros(())) + part.detach() * micro_batch.share
    figures = dict(zip(totals, all_reduce_sum(torch.stack([*totals.values()])).tolist(), strict=True))
    check_losses(figures, model, partial(compute_again, parallel.objective, micro_batches), step)
    if parallel.shards is not None:
        parallel.shards.average_scalars_()
    norm = check_gradients(model, step)
    if config.max_grad_norm is not None:
        for group in optimizer.param_groups:  # by groups: shares and whole tensors do not mix
            nn.utils.clip_grads_with_norm_(group["params"], config.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    norms.apply_()
    return figures


def compute_again(objective: nn.Module, micro_batches: list[MicroBatch]) -> None:
    """Run the batches of a step once more, with the same draws."""
    for micro_batch in micro_batches:
        seed_torch(*micro_batch.seeds)
        objective(micro_batch.batch)


@contextmanager
def reduced(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to bf16 where the recipe asks for it.

    On a CPU without torch's fused attention, whose bf16 backward takes five times as long as the plain products
    (32 texts of 32 tokens, 12 heads of 32: 82 ms a layer against 13).
    """
    if precision != "bf16":
        yield
        return
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16), plain:
        yield


def evaluation_due(config: TrainConfig, step: int, steps: int) -> bool:
    if config.evaluate_every is None:
        return False
    return step % config.evaluate_every == 0 or (step == steps and config.keep_checkpoint == "best")


def stopped_early(progress: Progress, config: TrainConfig) -> bool:
    return config.early_stopping is not None and progress.evals_without_improvement >= config.early_stopping
