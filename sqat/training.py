"""The one training loop, on Accelerate: every stage that trains goes through `fit`.

The caller gives a loss (a dict of weighted parts) and, where it changes the model between steps, a
`before_step`. The order of batches, the learning rate and the dropout masks are functions of (seed, step), so a
run stopped at any step continues from its last mid-stage state to the same weights (bit for bit on a CPU with
one thread). The state is safetensors and JSON, written beside and renamed; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sqat.checkpoint import write_synced
from sqat.data import Batch
from sqat.display import Display
from sqat.errors import SqatError, StoppedError
from sqat.insertion.quantizers import QUANTIZERS
from sqat.recipe import FitConfig
from sqat.soundness import check_gradients, check_losses, check_scales, learned_bounds, weakness
from sqat.stopping import any_process, noted_signals

REMARK_EVERY = 100  # steps


def processes() -> PartialState:
    """This process among those of a distributed run; on the CPU (gloo) where there is no accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def first_says(text: str) -> str:
    """What the first process says, so that all go the same way."""
    said = [text]
    broadcast_object_list(said)
    return said[0]


Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]
Figures = dict[str, float]


@dataclass
class Feed:
    """Where batches come from: `plan(epoch)` gives row indices of each batch, `collate` makes one."""

    plan: Callable[[int], list[list[int]]]
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
    """What a mid-stage state remembers beside tensors."""

    step: int = 0
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


def total_steps(config: FitConfig, batches: int, processes: int = 1) -> int:
    """Optimizer steps of a fit over an epoch of ``batches`` batches."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil((config.epochs or 1.0) * batches / (config.gradient_accumulation * processes)))


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
        """Write model, optimizer, best weights and random state as one mid-stage state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"random.{device}": value for device, value in random_states().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
        self.state.save({name: tensor.clone() for name, tensor in tensors.items()}, self.progress)

    def resume(self) -> bool:
        """Go on from the mid-stage state, if a sound one of this key is there."""
        loaded = self.state.load()
        if loaded is None:
            return False
        tensors, self.progress = loaded
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "random": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.best = parts["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        set_random_states(parts["random"])
        return True

    def evaluate(self, evaluation: Evaluation, config: FitConfig, judge_from: int) -> Figures:
        """Measure dev, remember the best weights where they are to be kept, count evaluations without gain."""
        state = random_states()
        figures = evaluation.measure()
        self.model.train()
        set_random_states(state)
        self.progress.history.append({"step": float(self.progress.step), **figures})
        if self.progress.step <= judge_from:
            return figures
        if figures[evaluation.metric] > self.progress.best:
            self.progress.best = figures[evaluation.metric]
            self.progress.without_gain = 0
            if config.keep == "best":
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        else:
            self.progress.without_gain += 1
        return figures

    def remark(self, title: str, display: Display) -> None:
        """Tell once of each kind what has become weak in the model."""
        for kind, line in weakness(self.model, self.progress.step).items():
            if kind not in self.remarked:
                display.say(f"{title}: {line}")
            self.remarked.add(kind)

    def finish(self) -> None:
        """Put the best weights back, where they were kept."""
        if self.best:
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
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)  # whatever the environment says
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    torch.manual_seed(seed)
    bounds = learned_bounds(model)
    start = {site: float(bound.detach()) for site, bound in bounds.items()}
    run = Run(model, optimizer, state)
    if run.resume():
        display.say(f"{title}: resumed at step {run.progress.step} of {steps}")
    elif state.directory.exists():
        known = "damaged, or of another run, length or number of processes"
        display.say(f"{title}: the mid-stage state is {known}: starting afresh")
    display.begin(title, steps)
    model.train()
    shown, saved = dict(run.progress.losses), time.monotonic()
    stream = micro_batches(feed, config.gradient_accumulation, accelerator, run.progress.step)
    stop = False
    with noted_signals() as asked:
        while not stop and run.progress.step < steps and not stopped_early(run.progress, config):
            begun = time.monotonic()
            if before_step is not None:
                before_step(run.progress.step)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * config.learning_rate * rate_factor(config, run.progress.step, steps)
            run.progress.step += 1
            run.progress.losses, samples = take_step(accelerator, wrapped, optimizer, loss, next(stream), config,
                                                     run.progress.step)  # fmt: skip
            check_scales(bounds, start, run.progress.step)
            run.progress.samples += samples
            seconds = time.monotonic() - begun
            shown |= run.progress.losses
            if run.progress.step % REMARK_EVERY == 0 or run.progress.step == steps:
                run.remark(title, display)
            if evaluation is not None and evaluation_due(config, run.progress.step, steps):
                shown |= run.evaluate(evaluation, config, judge_from)
            run.progress.seconds += time.monotonic() - begun
            display.update(run.progress.step, shown, samples / max(seconds, 1e-9))  # some clocks stand still meanwhile
            stop = any_process(asked(), accelerator.device)
            if not stop and time.monotonic() - saved >= config.save_every and run.progress.step < steps:
                saved = time.monotonic()
                if accelerator.is_main_process:
                    run.save()
        if any_process(asked(), accelerator.device):  # once more: a signal may have come during the last save
            if accelerator.is_main_process:
                run.save()
            accelerator.wait_for_everyone()  # a launcher ends all processes once the first has ended
            raise StoppedError(f"{title}: stopped and saved at step {run.progress.step} of {steps}",
                               "the same command, without --force, goes on from there")  # fmt: skip
    display.end()
    run.finish()
    done = run.progress
    return Fitted(done.step, done.seconds, done.samples, done.losses, done.history)


def micro_batches(feed: Feed, accumulation: int, accelerator: Accelerator, step: int) -> Iterator[list[Batch]]:
    """This process's batches of each optimizer step from ``step`` on."""
    world, rank = accelerator.num_processes, accelerator.process_index
    stream = feed.stream(step * accumulation * world)
    while True:
        share = [next(stream) for _ in range(accumulation * world)]
        yield [feed.collate(rows).to(accelerator.device) for rows in share[rank::world]]


def take_step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: list[Batch],
    config: FitConfig,
    step: int,
) -> tuple[Figures, int]:
    """One optimizer step over its micro-batches; returns the mean loss parts and the number of samples.

    Raises:
        SqatError: a loss or a gradient is no number; no weight has moved then.
    """
    totals: dict[str, Tensor] = {}
    rows = sum(len(batch) for batch in batches)
    for index, batch in enumerate(batches):
        sync = accelerator.no_sync(wrapped) if index + 1 < len(batches) else nullcontext()
        with sync:
            with reduced(config.precision, accelerator.device):
                parts = loss(wrapped, batch)
            share = len(batch) / rows
            accelerator.backward(torch.stack([*parts.values()]).sum() * share)
        for name, part in parts.items():
            totals[name] = totals.get(name, part.new_zeros(())) + part.detach() * share
    figures = {name: float(total) for name, total in totals.items()}
    model = accelerator.unwrap_model(wrapped)  # which does not wait for other processes
    check_losses(figures, model, lambda: [loss(model, batch) for batch in batches], step)
    check_gradients(model, step)
    if config.max_grad_norm is not None:
        accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures, rows * accelerator.num_processes


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


def random_states() -> dict[str, Tensor]:
    """State of torch's generators: CPU and every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    devices = [states[f"cuda{i}"] for i in range(len(states) - 1)]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)
