"""The export stage: write each target, check it by its rules, and prove parity on dev rows.

Files are written beside the checkpoint and linked into it. An export with a failed target leaves no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqat.checkpoint.store import Checkpoint
from sqat.distributed import process_state
from sqat.errors import GateError, SqatError
from sqat.evaluation.artifacts import open_artifact
from sqat.evaluation.parity import check_resemblance, prove_parity
from sqat.export.card import model_card
from sqat.export.source import Source, TargetFile
from sqat.export.targets import write_target
from sqat.files.replace import UNFINISHED, make_folder, remove_folder, write_synced
from sqat.lint.apply_rules import verify
from sqat.models.architectures import ARCHITECTURES
from sqat.models.attention import use_eager
from sqat.modules.batch_norm import absorb_folded_norms_, fold_batch_norms_
from sqat.recipe.stages import ExportConfig
from sqat.recipe.targets import TARGETS
from sqat.runtime.sessions import find_float_products, optimized_graph
from sqat.stages.context import StageContext
from sqat.training.resume import Metrics


def run(config: ExportConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Write and prove the files of every target."""
    if parent is None:
        raise SqatError(f"stage {context.name} has nothing to export", "put a train stage before it",
                        code="stage-order")  # fmt: skip
    with export_folder(context.state.directory) as folder:
        return export(config, parent, context, folder)


def export(config: ExportConfig, parent: Checkpoint, context: StageContext, folder: Path) -> Checkpoint:
    """Export into a folder; the checkpoint names the files in it."""
    model, processor = context.load_model(parent)
    use_eager(model.cpu())
    fold_batch_norms_(model)
    absorb_folded_norms_(model)
    dev = context.splits.prepared("dev", processor)
    sample = processor.collate(dev, list(range(min(2, len(dev)))))
    output = ARCHITECTURES[context.task.architecture].output
    sequence = sequence_range(config, context.recipe.model.max_length)
    source = Source(parent, model.eval(), sample.inputs, config, sequence, output, context.graphs)
    metrics: dict[str, Metrics] = {}
    notes: list[str] = []
    for target in config.targets:
        context.reporter.info(f"{context.name}: writing {target}")
        path, file = folder / TARGETS[target].file, write_target(target, source, folder)
        check_graph(path, file, parent)
        forward = open_artifact(path, "cpu")
        if context.is_rehearsal:
            check_resemblance(path.name, forward, file, dev)
            metrics[f"dev {target}"] = {}
            continue
        result, metrics[f"dev {target}"] = prove_parity(path.name, forward, file, dev, config, context.task)
        notes += [f"{target}: {result}", *(f"{target}: {note}" for note in file.notes)]
        context.reporter.info(f"{context.name}: {target}: {result}")
    metrics["dev"] = metrics[f"dev {config.targets[0]}"]
    manifest = context.manifest(config, parent, metrics=metrics, notes=notes)
    artifacts = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != UNFINISHED
    }
    sizes = {target: bytes_of(artifacts, TARGETS[target].file) for target in config.targets}
    card = model_card(manifest, sizes, context.task.architecture, output)
    return Checkpoint(manifest, {**parent.files, "README.md": card.encode()}, artifacts=artifacts)


@contextmanager
def export_folder(state: Path) -> Iterator[Path]:
    """Give an empty folder for exported files; delete it on failure, and on every rank but 0.

    The runner deletes the folder of rank 0 once the files are saved.
    """
    rank = process_state()
    folder = state / f"export-{rank.process_index}"
    make_folder(state)
    remove_folder(folder, UNFINISHED)
    folder.mkdir()
    is_saved = False
    try:
        write_synced(folder / UNFINISHED, b"")
        yield folder
        is_saved = rank.is_main_process  # the other ranks only compare
    finally:
        if not is_saved:
            remove_folder(folder, UNFINISHED)
            with suppress(OSError):
                state.rmdir()


def check_graph(path: Path, file: TargetFile, parent: Checkpoint) -> None:
    """Check an exported graph by the rules of its target.

    Raises:
        GateError: it breaks a rule, or ONNX Runtime would compute a product in float.
    """
    if file.graph is None:
        return
    patterns = {name: record.pattern for name, record in parent.manifest.layers.items() if record.pattern}
    verify(file.graph, patterns, file.rules, path)
    if file.runs_in_int8 and (float_products := find_float_products(optimized_graph(path), file.graph.graph)):
        raise GateError(f"ONNX Runtime would run {float_products[0]} of {path.name} in float",
                        "this is a fault of the exporter: please report it with the recipe",
                        code="broken-rule")  # fmt: skip


def sequence_range(config: ExportConfig, longest: int) -> tuple[int, int, int]:
    """Smallest, usual and largest number of tokens that an engine is built for."""
    return config.sequence_range or (min(16, longest), max(min(16, longest), longest // 2), longest)


def bytes_of(artifacts: dict[str, Path], name: str) -> int:
    """Bytes of an exported file with its external data, or of a folder."""
    prefixes = (f"{name}.data", f"{name}/")
    return sum(path.stat().st_size for key, path in artifacts.items() if key == name or key.startswith(prefixes))
