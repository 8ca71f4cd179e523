"""Export to the files of the engines and, at once, the proof that each is the model: nothing is kept of one that fails.

Each target (`sqat.export.targets`) is written, run on the CPU, and compared with the torch model on real dev rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint
from sqat.data.dataset import Processor, Rows, column
from sqat.errors import GateError, SqatError
from sqat.evaluation.artifacts import open_artifact
from sqat.evaluation.evaluate import rounded_otherwise, served_model
from sqat.evaluation.inference import logits_of, predict
from sqat.export.card import model_card
from sqat.export.targets import TARGETS, Source, Written
from sqat.lint.apply_rules import verify
from sqat.models.architectures import ARCHITECTURES
from sqat.models.attention import use_eager
from sqat.modules.batch_norm import absorb_, fold_batch_norms_
from sqat.recipe.stages import ExportConfig
from sqat.recipe.targets import TARGETS as SPECS
from sqat.runtime.sessions import left_in_float, optimized_graph, parity
from sqat.stages.context import StageContext
from sqat.tasks.slack import slack
from sqat.training.loop import Metrics

NOISE_FACTOR = 3
SHAKES = 8


@dataclass(frozen=True)
class Parity:
    """How far a file is from the torch model.

    Attributes:
        decisions: how many were compared: dev rows, or queries.
        difference: largest absolute difference of a logit.
        noise: the same between two roundings of the torch model itself.
        agreement: share of equal decisions, as the task defines them.
        doubtful: of the others, how many the torch model itself takes otherwise when it is rounded otherwise.
        disagreement: share of decisions that differ and that rounding does not explain.
    """

    decisions: int
    difference: float
    noise: float
    agreement: float
    doubtful: int
    disagreement: float

    def __str__(self) -> str:
        known = f" ({self.doubtful} more differ where torch, rounded otherwise, differs too)" if self.doubtful else ""
        return (
            f"{self.agreement:.2%} of {self.decisions} decisions equal{known}, largest logit difference "
            f"{self.difference:.1e} (torch rounded otherwise: {self.noise:.1e})"
        )


def run(config: ExportConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Write and prove the files of every target."""
    if parent is None:
        raise SqatError(f"stage {context.name} has nothing to export", "put a train stage before it")
    model, processor = context.load_model(parent)
    use_eager(model.cpu())
    fold_batch_norms_(model)
    absorb_(model)
    dev = context.splits.prepared("dev", processor)
    sample = processor.collate(dev, list(range(min(2, len(dev)))))
    source = Source(parent, model.eval(), sample.inputs, config,
                    sequence_range(config, context.recipe.model.max_length),
                    ARCHITECTURES[context.task.architecture].output)  # fmt: skip
    metrics: dict[str, Metrics] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sqat-") as name:
        folder = Path(name)
        for target in config.targets:
            context.reporter.info(f"{context.name}: writing {target}")
            written = TARGETS[target](source, folder)
            check_graph(folder / SPECS[target].file, written, parent)
            found, metrics[f"dev {target}"] = prove(folder / SPECS[target].file, written, dev, config, context)
            notes.append(f"{target}: {found}")
            context.reporter.info(f"{context.name}: {notes[-1]}")
            notes += [f"{target}: {note}" for note in written.notes]
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    metrics["dev"] = metrics[f"dev {config.targets[0]}"]
    manifest = context.manifest(config, parent, metrics=metrics, notes=[*parent.manifest.notes, *notes])
    sizes = {target: artifact_bytes(files, SPECS[target].file) for target in config.targets}
    card = model_card(
        manifest,
        {target: (SPECS[target].file, size) for target, size in sizes.items()},
        context.task.architecture,
        source.output,
    )
    return Checkpoint(manifest, {**parent.files, **files, "README.md": card.encode()})


def check_graph(path: Path, written: Written, parent: Checkpoint) -> None:
    """Check a written graph by the rules of its target.

    Raises:
        GateError: it breaks a rule, or ONNX Runtime would compute a product in float.
    """
    if written.graph is None:
        return
    patterns = {name: record.pattern for name, record in parent.manifest.layers.items() if record.pattern}
    verify(written.graph, patterns, written.rules, path)
    if written.runs_in_int8 and (float_products := left_in_float(optimized_graph(path))):
        raise GateError(f"ONNX Runtime would run {float_products[0]} of {path.name} in float",
                        "this is a fault of the exporter: please report it with the recipe")  # fmt: skip


def sequence_range(config: ExportConfig, longest: int) -> tuple[int, int, int]:
    """Smallest, usual and largest number of tokens an engine is built for."""
    return config.sequence_range or (min(16, longest), max(min(16, longest), longest // 2), longest)


def artifact_bytes(files: dict[str, bytes], name: str) -> int:
    """Bytes of a file with its external data, or of a folder."""
    return sum(
        len(content) for path, content in files.items() if path == name or path.startswith((f"{name}.data", f"{name}/"))
    )


def prove(
    artifact: Path, written: Written, dev: Rows, config: ExportConfig, context: StageContext
) -> tuple[Parity, Metrics]:
    """Run what was written on dev rows, compare it with the torch model it came from, and measure it.

    Raises:
        GateError: a logit differs by more than rounding explains, or more decisions than the recipe allows.
    """
    forward, task = open_artifact(artifact, "cpu"), context.task
    with served_model(written.reference) as (model, processor):
        some = whole_groups(dev, config.parity_samples)
        wanted = predict(partial(logits_of, model), some, processor)
        got = predict(forward, dev, processor)
        part = got[: len(some)]
        equal = task.same_decision(wanted, part, some)
        if not len(equal):
            raise SqatError(f"the first {len(some)} dev rows hold nothing to decide on", "raise parity_samples")
        difference = parity(wanted.numpy(), part.numpy())
        enough = (difference - slack(wanted) / 100) / NOISE_FACTOR
        noise, explained = 0.0, equal
        for other in rounded(model, some, processor, written.rounding):
            noise = max(noise, parity(wanted.numpy(), other.numpy()))
            explained = explained | ~task.same_decision(wanted, other, some)
            if noise >= enough and share(~explained) <= config.max_disagreement:
                break
    found = Parity(len(equal), difference, noise, share(equal), int((explained & ~equal).sum()), share(~explained))
    if noise < enough:
        raise GateError(
            f"{artifact.name} is off by {difference:.2e} in a logit, more than rounding explains "
            f"(torch rounded otherwise: {noise:.2e})",
            "nothing was written",
        )
    if found.disagreement > config.max_disagreement:
        raise GateError(
            f"{artifact.name} decides otherwise than the torch model in {found.disagreement:.2%} of "
            f"{found.decisions} decisions, allowed {config.max_disagreement:.2%} (largest logit difference "
            f"{found.difference:.2e})",
            "nothing was written",
        )
    return found, task.metrics(got, dev)


def rounded(model: nn.Module, rows: Rows, processor: Processor, size: float) -> Iterator[Tensor]:
    """What the torch model says of rows when it is rounded otherwise, several times.

    A value that lies on a tie moves by a whole quantization step, and a decision between two options that the model
    holds for equal falls the other way, but under some roundings only.
    """
    for seed in range(SHAKES):
        with rounded_otherwise(model, size, seed):
            yield predict(partial(logits_of, model), rows, processor)


def share(flags: Tensor) -> float:
    """Share of true ones."""
    return flags.float().mean().item()


def whole_groups(rows: Rows, count: int) -> Rows:
    """The first ``count`` rows, and the rest of the last query's group."""
    count = min(count, len(rows))
    if "group" in rows.column_names:
        groups = column(rows, "group")
        while count < len(rows) and groups[count] == groups[count - 1]:
            count += 1
    return rows.select(range(count))
