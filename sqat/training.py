"""The one training loop, on Accelerate: every stage that trains goes through `fit`.

The caller gives a loss (a dict of weighted parts) and, where it changes the model between steps, a
`before_step`. The learning rate is a function of the step; the order of batches, what is drawn for them (dropout,
noise, crops) and so the whole run are functions of the seed and the number of a batch. So a run stopped at any step
continues from its last mid-stage state to the same weights (bit for bit on a CPU with one thread), and processes that
share the batches of a step compute what one would that takes them all, but for the rounding of sums. How many batches
a step sums up is settled when a run begins; one that is gone on with in more or fewer processes keeps to it.

The state is safetensors and JSON, written beside and renamed; nothing is unpickled. The first process writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from sqat.checkpoint import write_synced
from sqat.data import Batch
from sqat.display import Display
from sqat.errors import SqatError, StoppedError
from sqat.insertion.quantizers import QUANTIZERS
from sqat.layers import encoder_blocks
from sqat.processes import any_process, first_says, in_shards, processes, summed, turns
from sqat.recipe import FitConfig
from sqat.sharding import Shards, like, plain, send_gradients_, sharded_, whole
from sqat.soundness import check_gradients, check_losses, check_scales, learned_bounds, weakness
from sqat.stopping import noted_signals

REMARK_EVERY = 100  # steps


Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]
Figures = dict[str, float]


@dataclass
class Feed:
    """Where batches come from: `plan(epoch)` gives row indices of each batch, `collate` makes one."""

    plan: Callable[[int], Sequence[list[int]]]
    collate: Callable[[list[int]], Batch]

    def stream(self, start: int) -> Iterator[list[int]]:
        """Row indices of batch ``start`` and all after it, over the epochs."""
        epoch = 0
        while True:
            batches = self.plan(epoch)
            if not batches:
                raise SqatError("no batch of training rows is left", "look at data.train and task")
            yield from batches[start:]
            start = max(0, start - len(batches))
            epoch += 1


@dataclass
class Evaluation:
    """How the dev split is measured: a figure to maximise among all figures."""

    measure: Callable[[], Figures]
    metric: str


@dataclass
class Progress:
    """What a mid-stage state remembers beside tensors; ``together`` is how many batches a step sums up."""

    step: int = 0
    together: int = 1
    best: float = -math.inf
    without_gain: int = 0
    seconds: float = 0.0
    samples: int = 0
    losses: Figures = field(default_factory=dict)
    history: list[Figures] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """What a fit did: optimizer steps, seconds, samples, the last step's loss parts, the dev figures on the way."""

    steps: int
    seconds: float
    samples: int
    losses: Figures
    history: list[Figures]


def batches_together(config: FitConfig, state: MidStage) -> int:
    """How many batches an optimizer step sums up over all processes: as many as the fit that is gone on with had."""
    known = state.peek()
    return config.gradient_accumulation * processes().num_processes if known is None else known.together


def rate_factor(config: FitConfig, step: int, steps: int) -> float:
    """Learning rate of a step (from 0) as a share of the peak: linear warm-up, then the recipe's decay to 0."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "constant":
        return 1.0
    return 1 - share if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
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


class MidStage:
    """The mid-stage state on disk: one safetensors file of tensors, one JSON that points to it.

    Args:
        directory: of its own, removed when the stage ends.
        key: of the stage; a state of another key is not used.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.key = directory, key
        self.found: list[tuple[dict[str, Tensor], Progress] | None] = []

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the tensors, then the JSON, each beside and renamed; then drop older tensors.

        Raises:
            SqatError: the disk is full or the like; the last state is still whole.
        """
        content = tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name, known = f"step-{progress.step}.safetensors", vars(progress)
        index = {"key": self.key, "file": name, "sha256": state_digest(content, known), "progress": known}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for target, data in ((name, content), ("state.json", json.dumps(index).encode())):
                write_synced(self.directory / f".{target}.new", data)
                (self.directory / f".{target}.new").rename(self.directory / target)
            for old in self.directory.glob("step-*.safetensors"):
                if old.name != name:
                    old.unlink()
        except OSError as error:
            raise SqatError(f"the mid-stage state cannot be written: {error.strerror or error}", "free space",
                            str(self.directory)) from error  # fmt: skip
        finally:
            for half in self.directory.glob(".*.new"):
                half.unlink(missing_ok=True)

    def peek(self) -> Progress | None:
        """What the state remembers that a fit will go on from; it is read once, and kept until it is taken."""
        if not self.found:
            self.found = [self.load()]
        return None if self.found[0] is None else self.found[0][1]

    def take(self) -> tuple[dict[str, Tensor], Progress] | None:
        """What `load` gives, or gave to `peek`.

        Raises:
            SqatError: the processes of this run do not all find the same.
        """
        known = self.peek()
        told = "" if known is None else json.dumps(asdict(known))
        if any(any_process(told != first_says(told))):
            raise SqatError("not every process finds the same mid-stage state",
                            "put the output where all hosts see it", str(self.directory))  # fmt: skip
        return self.found.pop()

    def load(self) -> tuple[dict[str, Tensor], Progress] | None:
        """The last state; None if there is none, it is of another key, or it is damaged."""
        try:
            index = json.loads((self.directory / "state.json").read_bytes())
            if index["key"] != self.key:
                return None
            content = (self.directory / Path(index["file"]).name).read_bytes()
            if state_digest(content, index["progress"]) != index["sha256"]:
                return None
            return parse_tensors(content), Progress(**index["progress"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def state_digest(content: bytes, progress: Mapping[str, object]) -> str:
    """sha256 of a mid-stage state: its tensors and what it remembers beside them."""
    return hashlib.sha256(content + json.dumps(progress).encode()).hexdigest()


@dataclass
class Run:
    """One fit under way: what is saved, resumed and finally kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: MidStage
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    remarked: set[str] = field(default_factory=set)

    def save(self) -> None:
        """Let the first process write model, optimizer and best weights as one mid-stage state; all must call it."""
        if not (in_shards() or processes().is_main_process):
            return
        with plain(self.model):
            tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, values in sorted(self.optimizer.state_dict()["state"].items()):  # in one order in all processes
            known = {name: value for name, value in sorted(values.items()) if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in known.items()}
        if processes().is_main_process:
            self.state.save({name: tensor.clone() for name, tensor in tensors.items()}, self.progress)

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
        with plain(self.model):
            self.model.load_state_dict(parts["model"])
        self.best = parts["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for name, tensor in parts["optimizer"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = like(weights[int(index)], tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return True

    def evaluate(self, evaluation: Evaluation, config: FitConfig, judge_from: int) -> Figures:
        """Measure dev, remember the best weights where they are to be kept, count evaluations without gain."""
        with plain(self.model):
            return self.judge(evaluation.measure(), evaluation.metric, config, judge_from)

    def judge(self, figures: Figures, metric: str, config: FitConfig, judge_from: int) -> Figures:
        """Note what was measured of the model as it stands; returns that."""
        self.model.train()
        self.progress.history.append({"step": float(self.progress.step), **figures})
        if self.progress.step <= judge_from:
            return figures
        if figures[metric] > self.progress.best:
            self.progress.best = figures[metric]
            self.progress.without_gain = 0
            if config.keep == "best":
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        else:
            self.progress.without_gain += 1
        return figures

    def remark(self, title: str, display: Display) -> None:
        """Tell once of each kind what has become weak in the model."""
        with plain(self.model):
            found = weakness(self.model, self.progress.step)
        for kind, line in found.items():
            if kind not in self.remarked:
                display.say(f"{title}: {line}")
            self.remarked.add(kind)

    def finish(self) -> None:
        """Put the best weights back, where they were kept."""
        if self.best:
            with plain(self.model):
                self.model.load_state_dict(self.best)
        self.model.eval()


def fit(
    model: nn.Module,
    loss: Loss,
    feed: Feed,
    config: FitConfig,
    *,
    steps: int,
    seed: int,
    title: str,
    display: Display,
    state: MidStage,
    evaluation: Evaluation | None = None,
    before_step: Callable[[int], None] | None = None,
    judge_from: int = 0,
) -> Fitted:
    """Train ``model`` in place for ``steps`` optimizer steps.

    Args:
        loss: weighted parts of the loss of one batch; their sum is minimised.
        state: where the mid-stage state is kept; an unfinished run of the same key goes on from it.
        evaluation: measured every ``config.evaluate_every`` steps, where that is set; after the last one too where
            the best step's weights are kept, so that it is among those compared.
        before_step: called before each step with its number; what it changes in the model must be in the
            model's state dict, so that a resumed run finds it there.
    """
    processes()  # before Accelerator, which would not find gloo by itself
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1,  # whatever the environment says
                              kwargs_handlers=[REPLICAS])  # fmt: skip
    together = batches_together(config, state)
    with spread_(Objective(model, loss), accelerator) as spread:
        optimizer = make_optimizer(model, config)
        run = Run(model, optimizer, state, Progress(together=together))
        begin(run, title, steps, config, display)
        work = steps_of_work(feed, together, seed, accelerator.device, run.progress.step)
        bounds = learned_bounds(model)
        start = {site: float(bound.detach()) for site, bound in bounds.items()}
        model.train()
        shown, saved = dict(run.progress.losses), time.monotonic()
        stop = False
        with noted_signals() as asked:
            while not stop and run.progress.step < steps and not stopped_early(run.progress, config):
                begun = time.monotonic()
                if before_step is not None:
                    before_step(run.progress.step)
                factor = rate_factor(config, run.progress.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["factor"] * config.learning_rate * factor
                run.progress.step += 1
                pieces, samples = next(work)
                run.progress.losses = take_step(spread, optimizer, pieces, config, run.progress.step)
                check_scales(bounds, start, run.progress.step)
                run.progress.samples += samples
                seconds = time.monotonic() - begun
                shown |= run.progress.losses
                if run.progress.step % REMARK_EVERY == 0 or run.progress.step == steps:
                    run.remark(title, display)
                if evaluation is not None and evaluation_due(config, run.progress.step, steps):
                    shown |= run.evaluate(evaluation, config, judge_from)
                run.progress.seconds += time.monotonic() - begun
                display.update(run.progress.step, shown, samples / max(seconds, 1e-9))  # some clocks stand still
                due = accelerator.is_main_process and time.monotonic() - saved >= config.save_every
                stop, due = any_process(asked(), due)
                if due and not stop and run.progress.step < steps:
                    saved = time.monotonic()
                    run.save()
            if any(any_process(asked())):  # once more: a signal may have come during the last save
                run.save()
                accelerator.wait_for_everyone()  # a launcher ends all processes once the first has ended
                raise StoppedError(f"{title}: stopped and saved at step {run.progress.step} of {steps}",
                                   "the same command, without --force, goes on from there")  # fmt: skip
        display.end()
        run.finish()
    done = run.progress
    return Fitted(done.step, done.seconds, done.samples, done.losses, done.history)


def begin(run: Run, title: str, steps: int, config: FitConfig, display: Display) -> None:
    """Go on from the mid-stage state where there is one, and say what is done and by how many processes."""
    sharing, there = shared_work(run.progress.together, config.gradient_accumulation), run.state.directory.exists()
    if run.resume():
        display.say(f"{title}: resumed at step {run.progress.step} of {steps}{sharing and f'; {sharing}'}")
    elif there:
        display.say(f"{title}: the mid-stage state is damaged, or of another run or length: starting afresh")
    if sharing and not run.progress.step:
        display.say(f"{title}: {sharing}")
    display.begin(title, steps)


# Buffers are equal in all processes after every step (`average_norms_`). A loss may not reach every parameter; where
# torch looks for those, it does not deal gradients anew after the first step either, so that sums keep their order.
REPLICAS = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)


class Objective(nn.Module):
    """The loss as a module, so that what spreads it over processes sees which parameters the loss reaches."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model, batch)


@dataclass(frozen=True)
class Spread:
    """The objective over all processes: each holds a replica of the model (DDP), or its shares (FSDP), or is alone.

    Attributes:
        called: computes the loss parts of a batch.
    """

    objective: Objective
    called: nn.Module
    accelerator: Accelerator
    shards: Shards | None

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """While open, gradients are only gathered: another batch of the step follows."""
        if self.shards is None:
            with self.accelerator.no_sync(self.called):
                yield
            return
        send_gradients_(self.objective, False)
        yield
        send_gradients_(self.objective, True)


@contextmanager
def spread_(objective: Objective, accelerator: Accelerator) -> Iterator[Spread]:
    """Spread a model over the processes; afterwards each has the whole of it."""
    if not in_shards():
        yield Spread(objective, accelerator.prepare(objective), accelerator, None)
        return
    model = objective.model
    with sharded_(objective, model, encoder_blocks(model)) as shards:
        yield Spread(objective, objective, accelerator, shards)


@dataclass(frozen=True)
class Piece:
    """One batch of an optimizer step.

    Attributes:
        batch: on this process's device.
        share: of the step's rows; 0 where another process has it and this one only keeps step.
        seeds: of what the model draws for it.
    """

    batch: Batch
    share: float
    seeds: tuple[int, ...]


def steps_of_work(
    feed: Feed, together: int, seed: int, device: torch.device, step: int
) -> Iterator[tuple[list[Piece], int]]:
    """This process's batches of each optimizer step from ``step`` on, and the rows of that step in all processes."""
    stream = feed.stream(step * together)
    for first in count(step * together, together):
        planned = [next(stream) for _ in range(together)]
        rows, pieces = sum(map(len, planned)), []
        for index, counts in turns(together):
            seed_draws(seed, first + index, 0)
            batch = feed.collate(planned[index]).to(device)
            share = len(planned[index]) / rows if counts else 0.0
            pieces.append(Piece(batch, share, (seed, first + index, 1)))
        yield pieces, rows


def seed_draws(*numbers: int) -> None:
    """Make what torch draws from here on, on every device, a function of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def shared_work(together: int, accumulation: int) -> str:
    """What to say of a step's batches; empty where one process takes as many as the recipe says."""
    world = processes().num_processes
    if world == 1 and together == accumulation:
        return ""
    kept = "" if together == accumulation * world else f" as when it began, not {accumulation * world}"
    return f"{world} process{'es' if world > 1 else ''}, an optimizer step sums up {together} batches{kept}"


def take_step(
    spread: Spread, optimizer: torch.optim.Optimizer, pieces: list[Piece], config: FitConfig, step: int
) -> Figures:
    """One optimizer step over its batches; returns the mean loss parts over those of all processes.

    Raises:
        SqatError: a loss or a gradient is no number; no weight has moved then, in any process.
    """
    totals: dict[str, Tensor] = {}
    device, world = spread.accelerator.device, spread.accelerator.num_processes
    for index, piece in enumerate(pieces):
        sync = spread.unsynced() if index + 1 < len(pieces) else nullcontext()
        seed_draws(*piece.seeds)
        with sync:
            with reduced(config.precision, device):
                parts = spread.called(piece.batch)
            weight = piece.share * world  # gradients are averaged over the processes
            spread.accelerator.backward(torch.stack([*parts.values()]).sum() * weight)
        for name, part in parts.items():
            totals[name] = totals.get(name, part.new_zeros(())) + part.detach() * piece.share
    figures = dict(zip(totals, summed(torch.stack([*totals.values()])).tolist(), strict=True))
    model = spread.objective.model
    check_losses(figures, model, partial(compute_again, spread.objective, pieces), step)
    if spread.shards is not None:
        spread.shards.average_scalars_()
    norm = check_gradients(model, step)
    if config.max_grad_norm is not None:
        for group in optimizer.param_groups:  # by groups: shares and whole tensors do not mix
            nn.utils.clip_grads_with_norm_(group["params"], config.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average_norms_(model)
    return figures


def compute_again(objective: nn.Module, pieces: list[Piece]) -> None:
    """Run the batches of a step once more, with the same draws."""
    for piece in pieces:
        seed_draws(*piece.seeds)
        objective(piece.batch)


def average_norms_(model: nn.Module) -> None:
    """Give all processes the mean of what their batch norms have seen, so that each holds the same model."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms or processes().num_processes == 1:
        return
    known = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    mean = summed(torch.cat([*known])) / processes().num_processes
    for buffer, part in zip(known, mean.split([len(buffer) for buffer in known]), strict=True):
        buffer.copy_(part)


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


def evaluation_due(config: FitConfig, step: int, steps: int) -> bool:
    if config.evaluate_every is None:
        return False
    return step % config.evaluate_every == 0 or (step == steps and config.keep == "best")


def stopped_early(progress: Progress, config: FitConfig) -> bool:
    return config.early_stopping is not None and progress.without_gain >= config.early_stopping
