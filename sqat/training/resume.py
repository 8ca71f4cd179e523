"""A training under way: what is saved, how it resumes, and which weights are kept in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sqat.distributed import process_state, run_on_rank0, uses_fsdp
from sqat.progress import Reporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import describe_sharing
from sqat.training.fsdp import full_tensor, shard_like, summon_full_params
from sqat.training.health import weak_layer_warnings
from sqat.training.resume_state import Progress, ResumeState

Metrics = dict[str, float]


@dataclass
class Evaluation:
    """How the dev split is measured: all metrics, and the one to maximise."""

    measure: Callable[[], Metrics]
    metric: str


@dataclass
class TrainingRun:
    """A training under way: what is saved, resumed and finally kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: ResumeState
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
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
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean.items()}
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
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "mean": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        with summon_full_params(self.model):
            self.model.load_state_dict(parts["model"])
        self.best = parts["best"]
        named = dict(self.model.named_parameters())
        self.mean = {name: tensor.to(named[name].device) for name, tensor in parts["mean"].items()}
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

    @torch.no_grad()
    def average(self, decay: float, count: int) -> None:
        """Take the weights into their running mean: the plain mean at first, then with a decay.

        Args:
            count: which weights these are, from 1.
        """
        share = max(1 / count, 1 - decay)
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                self.mean.setdefault(name, weight.clone()).lerp_(weight, share)

    def warn_of_weak_layers(self, title: str, reporter: Reporter) -> None:
        """Report dead layers and rows of zeros, each kind once."""
        with summon_full_params(self.model):
            warnings = weak_layer_warnings(self.model, self.progress.step)
        for kind, line in warnings.items():
            if kind not in self.reported:
                reporter.info(f"{title}: {line}")
            self.reported.add(kind)

    @torch.no_grad()
    def keep_chosen(self) -> None:
        """Load the best weights or the mean where they were kept, and leave the model in evaluation mode."""
        if self.best:
            with summon_full_params(self.model):
                self.model.load_state_dict(self.best)
        for name, weight in self.model.named_parameters() if self.mean else ():
            weight.copy_(self.mean.get(name, weight))
        self.model.eval()


def resolve_accumulation_steps(config: TrainConfig, state: ResumeState) -> int:
    """Return how many batches an optimizer step sums up over all ranks; a resumed training keeps its number."""
    resumed = state.peek()
    if resumed is not None:
        return resumed.accumulation_steps
    return config.gradient_accumulation * int(process_state().num_processes)


def start_or_resume(run: TrainingRun, title: str, steps: int, config: TrainConfig, reporter: Reporter) -> None:
    """Load the resume state where there is one, and report where training starts and how ranks share it."""
    sharing = describe_sharing(run.progress.accumulation_steps, config.gradient_accumulation)
    has_state = run.state.exists
    if run.resume():
        reporter.info(f"{title}: resumed at step {run.progress.step} of {steps}{sharing and f'; {sharing}'}")
    elif has_state:
        reporter.info(f"{title}: cannot resume from {run.state.directory}: damaged, or written by another "
                      "configuration; restarting the stage")  # fmt: skip
    if sharing and not run.progress.step:
        reporter.info(f"{title}: {sharing}")
    reporter.start(title, steps)
