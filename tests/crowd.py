"""Train on several ranks, as a script: ``python -m tests.crowd FOLDER``.

It imports everything once and forks each group of processes (1, 2, 4, ...), which are joined by gloo; what every
process ends with is written to ``FOLDER/<group>-<rank>.pt``, for `tests/test_distributed.py` to compare.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn

from sqat.compress.calibrate import calibrate, merge_over_processes_
from sqat.compress.judge_amax import RowSample
from sqat.compress.quantize import masked_model
from sqat.compress.reconstruct import AFTER, BEFORE, Reconstruction, without_dropout
from sqat.compress.statistics import collect_statistics, first_batches
from sqat.data.batch import Batch
from sqat.distributed import assigned_indices, process_state, uses_fsdp
from sqat.errors import SqatError
from sqat.evaluation.inference import predict
from sqat.modules.parametrize import insert_weights_, original_weight, remove_weights_
from sqat.modules.sites import Site
from sqat.progress import SilentReporter
from sqat.quantization.calibrators.auto import Auto
from sqat.quantization.histogram import Histogram
from sqat.recipe.stages import TrainConfig
from sqat.sparsity.criteria.sparsegpt import SparseGPT
from sqat.sparsity.criteria.taylor import Taylor
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.training.batches import Batches
from sqat.training.fsdp import summon_full_params
from sqat.training.loop import fit
from sqat.training.resume import Evaluation
from sqat.training.resume_state import ResumeState
from tests import forks

LIMIT = 240.0  # seconds for all groups
ACCUMULATION_STEPS = 4  # batches of an optimizer step, whoever has them
STEPS = 6
STOP = 3
QUERY = "bert.encoder.layer.0.attention.self.query"
LAYERS = (QUERY, "bert.encoder.layer.0.intermediate.dense")
Found = dict[str, Any]


class KilledError(Exception):
    """As if the process had gone."""


class Watcher(SilentReporter):
    """Records messages and losses, and raises at one step."""

    def __init__(self, stop: int) -> None:
        self.stop, self.said, self.losses = stop, list[str](), list[float]()

    def info(self, text: str) -> None:
        self.said.append(text)

    def advance(self, step: int, values: Any, rate: float) -> None:
        self.losses.append(values["task"])
        if step == self.stop:
            raise KilledError


def tiny_bert(layers: int = 1) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def batches_of(rows: int, batch_size: int) -> Batches:
    """Sequences of several lengths whose label is in their first token; what is drawn for a batch is in it too."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 30, (rows, 8), generator=random)
    real = (torch.arange(8) < torch.randint(3, 9, (rows, 1), generator=random)).long()

    def plan(epoch: int) -> list[list[int]]:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[start : start + batch_size] for start in range(0, rows, batch_size)]

    def collate(chosen: list[int]) -> Batch:
        noisy = torch.where(torch.rand(len(chosen), 8) < 0.1, 1, ids[chosen])
        return Batch({"input_ids": noisy, "attention_mask": real[chosen]}, ids[chosen][:, 0] % 2, real[chosen][:, 0])

    return Batches(plan, collate)


def task_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"task": nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)}


def hidden_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A loss from inside the block, which reaches neither its second half nor the head."""
    seen: list[Tensor] = []
    bert: Any = model.get_submodule(QUERY)
    handle = bert.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**batch.inputs)
    handle.remove()
    return {"task": seen[0].square().mean()}


def train(state: Path, loss: Any = task_loss, stop: int = 0, **config: Any) -> Found:
    """A fit of `STEPS` steps, whose masks are set before the third; ``stop`` kills it."""
    torch.manual_seed(0)
    model, watcher = tiny_bert(), Watcher(stop)
    ones = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in LAYERS}
    transforms = insert_weights_(model, ones, ())

    def before_step(step: int) -> None:
        if step == 2:
            with summon_full_params(model), summon_full_params(model):  # the inner one changes nothing
                for name, transform in transforms.items():
                    weight = original_weight(model.get_submodule(name)).detach()
                    transform.mask.copy_(nm_mask(weight.abs(), parse_pattern("2:4")))

    known = {"batch_size": 5, "learning_rate": 0.01, "save_every": 0, "gradient_accumulation": accumulation(), **config}
    measured = Evaluation(lambda: {"score": float(model.classifier.weight.detach().sum())}, "score")
    try:
        done = fit(model, loss, batches_of(24, 5), TrainConfig(**known), steps=STEPS, seed=3, title="crowd",
                   reporter=watcher, state=ResumeState(state, "key"), evaluation=measured,
                   before_step=before_step)  # fmt: skip
    except KilledError:
        return {"losses": watcher.losses}
    masks = remove_weights_(model, transforms)
    return {"weights": {name: tensor.clone() for name, tensor in model.state_dict().items()}, "masks": masks,
            "losses": watcher.losses, "said": watcher.said, "samples": done.samples,
            "score": [figures["score"] for figures in done.history]}  # fmt: skip


class Filling(SilentReporter):
    """The disk of rank 0 is full from one step on."""

    def __init__(self, disk: ExitStack) -> None:
        self.disk = disk

    def advance(self, step: int, values: Any, rate: float) -> None:
        if step == STOP and process_state().is_main_process:
            self.disk.enter_context(forks.full_disk(1000))


def train_without_room(state: ResumeState) -> Found:
    """Train without room to save; returns the error and the step of the last saved state."""
    config = TrainConfig(batch_size=5, save_every=0)
    with ExitStack() as disk:
        try:
            fit(tiny_bert(), task_loss, batches_of(24, 5), config, steps=STEPS, seed=3, title="crowd",
                reporter=Filling(disk), state=state)  # fmt: skip
        except SqatError as error:
            known = state.load()
            return {"told": str(error), "step": known and known[1].step}
    return {}


def accumulation() -> int:
    return max(1, ACCUMULATION_STEPS // process_state().num_processes)


def train_and_kill(folder: Path, group: str) -> Found:
    """Train from start to end, and once until killed."""
    train(folder / f"{group}-state", stop=STOP, evaluate_every=2)
    return {"fit": train(folder / f"{group}-whole", evaluate_every=2),
            "hidden": train(folder / f"{group}-hidden", hidden_loss)}  # fmt: skip


def other_work(folder: Path, group: str) -> Found:
    """Compute what the ranks share beside training."""
    model, batches = tiny_bert(), batches_of(24, 5)
    insert_weights_(model, {name: torch.ones_like(model.get_submodule(name).weight) > 0 for name in LAYERS}, ())
    owners = dict(zip(LAYERS, LAYERS, strict=True))
    sums = {str(criterion): collect_statistics(criterion, model, owners, task_loss,
                                               first_batches(batches, criterion.samples, 0))
            for criterion in (Wanda(), SparseGPT(), Taylor(), Taylor(average="mean"))}  # fmt: skip
    norm = {steps: train_batch_norm(ResumeState(folder / f"{group}-normed", "key"), steps) for steps in (1, STEPS)}
    full = train_without_room(ResumeState(folder / f"{group}-full", "key"))
    blocks = train_blocks(ResumeState(folder / f"{group}-blocks", "key"))
    return {"full": full, "norm": norm, "blocks": blocks, "sums": sums, "histograms": histograms(),
            "scales": scales(), "logits": logits(), "indices": [*assigned_indices(3)]}  # fmt: skip


def histograms() -> dict[str, dict[str, Tensor]]:
    """Of six batches of very unlike sizes."""
    found = {"a": Histogram(), "b": Histogram(), "empty": Histogram()}
    for number, counts in assigned_indices(6):
        x = torch.randn(500, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number - 3)
        if counts:
            found["a"].observe(x)
            found["b"].observe(x.flip(0)[:7])
    merge_over_processes_(found)
    return {name: vars(each) for name, each in found.items()}


def scales() -> Found:
    """Scales by method auto; the ranks share five batches."""
    model = tiny_bert()
    torch.manual_seed(0)  # of the noise in the batches
    batches = [batches_of(24, 5).collate([*range(start, start + 4)]).inputs for start in range(0, 20, 4)]
    own = batches[process_state().process_index :: process_state().num_processes]
    found = calibrate(model, own, Auto(rows=12), "tensorrt", LAYERS, batches[0])
    chosen = {str(site): (found.amax[found.shared_with[site]], method) for site, method in found.methods.items()}
    site = Site.of(QUERY, "input")
    sample = RowSample(model, [site], 12)
    for number, counts in assigned_indices(6):
        if counts:
            sample.observe(site, torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(number)), None, number)
    sample.merge_over_processes()
    return {**chosen, "rows": sample.rows, "ranks": sample.ranks}


class Numbers:
    """A processor whose batches are the numbers of their rows."""

    def collate(self, rows: Any, indices: list[int]) -> Batch:
        given = torch.tensor(indices)
        return Batch({"x": given}, given, given)


def logits() -> Tensor:
    rows: Any = datasets.Dataset.from_dict({"length": [row % 7 for row in range(150)]})
    processor: Any = Numbers()
    return predict(lambda batch: torch.stack([batch.labels.sin(), batch.labels.cos()], dim=1), rows, processor)


class Normed(nn.Module):
    """A layer behind a batch norm of what is in the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.norm(x))
        return logits


def train_batch_norm(state: ResumeState, steps: int) -> Found:
    """Train with a batch norm; returns its buffers."""
    torch.manual_seed(0)
    model, config = Normed(), TrainConfig(batch_size=5, gradient_accumulation=accumulation(), learning_rate=0.01)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": nn.functional.cross_entropy(model(batch.inputs["input_ids"].float()), batch.labels)}

    fit(
        model,
        loss,
        batches_of(24, 5),
        config,
        steps=steps,
        seed=3,
        title="crowd",
        reporter=SilentReporter(),
        state=state,
    )
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def train_blocks(state: ResumeState) -> Found:
    """Reconstruct two blocks of a pruned model; returns its weights and the errors."""
    teacher, model, made = tiny_bert(2).eval(), tiny_bert(2), batches_of(24, 5)
    names = [f"bert.encoder.layer.{block}.{layer}.dense" for block in (0, 1) for layer in ("intermediate", "output")]
    for each in (teacher, model):
        for name in names:
            each.get_submodule(name).weight.data *= 20  # so that pruning is felt
    masks = {name: nm_mask(model.get_submodule(name).weight.detach().abs(), parse_pattern("2:4")) for name in names}

    def collate(rows: list[int]) -> Batch:
        torch.manual_seed(rows[0])
        return Batch(made.collate(rows).inputs, torch.tensor(rows), torch.empty(0))

    batches = Batches(lambda epoch: made.plan(0), collate)
    config = TrainConfig(gradient_accumulation=accumulation(), learning_rate=1e-3, evaluate_every=3)
    with masked_model(model, masks), without_dropout(model):
        blocks = Reconstruction(model, teacher, [collate(rows) for rows in made.plan(0)], 3)
        done = fit(model, blocks.loss, batches, config, steps=blocks.steps, seed=3, title="crowd",
                   reporter=SilentReporter(), state=state, before_step=blocks.before_step, lr_period=3,
                   evaluation=Evaluation(blocks.measure, AFTER), best_from_step=blocks.steps)  # fmt: skip
    errors = [[figures[BEFORE], figures[AFTER]] for figures in done.history]
    return {"weights": {name: tensor.clone() for name, tensor in model.state_dict().items()}, "errors": errors}


def first_part(folder: Path, group: str) -> Found:
    return train_and_kill(folder, group) | other_work(folder, group)


def resumed(folder: Path, group: str) -> Found:
    """Resume from the states of other numbers of ranks; ``group`` is e.g. ``2 after 4``."""
    found = {}
    for before in ("1", "2", "4", "shards"):
        source, own = folder / f"{before}-state", folder / f"{group} after {before}"
        if process_state().is_main_process:
            shutil.copytree(source, own)
        process_state().wait_for_everyone()
        found[before] = train(own, evaluate_every=2)
    return found


def train_sharded(folder: Path, group: str) -> Found:
    """Train a sharded model."""
    assert uses_fsdp()
    return train_and_kill(folder, group)


GROUPS: dict[str, tuple[int, Callable[[Path, str], Found]]] = {
    "1": (1, first_part),
    "2": (2, first_part),
    "4": (4, first_part),
    "shards": (2, train_sharded),
    "1 again": (1, resumed),
    "2 again": (2, resumed),
    "3 again": (3, resumed),
    "shards again": (2, resumed),
}


def run_group(group: str, folder: Path) -> None:
    """Fork the processes of a group and wait for all; SystemExit where one fails."""
    world, work = GROUPS[group]

    def kept(rank: int) -> None:
        torch.save(work(folder, group), folder / f"{group}-{rank}.pt")

    if any(ended := forks.ends(forks.start(world, kept, "shards" in group))):
        sys.exit(f"group {group} ended with {ended}")


def time_out(number: int, frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, time_out)
    signal.alarm(int(LIMIT))
    torch.set_num_threads(1)
    for name in GROUPS:
        begun = time.monotonic()
        run_group(name, Path(sys.argv[1]))
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
