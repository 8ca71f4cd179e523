"""Run a recipe or one of its stages: skip what is unchanged, run what is not, measure the results.

A stage is unchanged if its checkpoint is what the recipe makes from the checkpoints that lie there
(`sqat.pipeline.graph`). How one stage runs is in `sqat.pipeline.stage_run`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST, Manifest, load_manifest, verify_files
from sqat.checkpoint.store import load_checkpoint
from sqat.data.rows import SplitName
from sqat.distributed import broadcast_from_rank0, raise_on_lost_peer, run_on_rank0
from sqat.errors import SqatError
from sqat.evaluation.evaluate import predict_artifact
from sqat.evaluation.stored_outputs import check_storable, format_outputs
from sqat.files.replace import replace_file
from sqat.pipeline.graph import StageGraph, StageNode, resolve_graph, stage_directory, try_load_manifest
from sqat.pipeline.lock import LOCK_FILE, run_lock
from sqat.pipeline.plan import pending_stages
from sqat.pipeline.quality_gates import first_failed_gate, gate_error, gate_limits
from sqat.pipeline.rehearsal import rehearse, rehearse_new
from sqat.pipeline.results import Results, measure_results
from sqat.pipeline.run_folder import check_run_folder, check_stage_folder
from sqat.pipeline.stage_run import StageRun, load_parent, remove_rejected
from sqat.progress import Reporter
from sqat.recipe.schema import LoadedRecipe
from sqat.tasks.splits import Splits
from sqat.training.tracking import check_installed, open_trackers

STAGE_FOLDER = re.compile(r"\d{2,}-")


def run(
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
    rehearsal: Reporter | None = None,
) -> Results:
    """Run the stages from ``first`` to ``last`` that are not current, and measure the results.

    Args:
        rehearsal: where a rehearsal of these stages is reported, which comes first; None for no rehearsal.
    """
    folder = loaded.run_directory
    check_run_folder(folder)
    check_installed(loaded.recipe)
    with raise_on_lost_peer(), run_lock(folder, reporter):
        graph, splits = resolve_graph(loaded), Splits(loaded.recipe, loaded.path.parent)
        pending = pending_stages(graph, first, last, force)
        for node in pending:
            check_stage_folder(node.directory)
        if rehearsal is not None:
            rehearse_new(graph, pending, splits, rehearsal)
        with open_trackers(loaded.recipe, folder, reporter) as tracker:
            for node in graph.select(first, last):
                if node not in pending and node.is_current and check_unchanged(graph, node, tracker):
                    continue
                if node.directory.exists() and node.manifest is None:
                    tracker.info(f"{node.name}: {node.directory} holds no valid checkpoint; running the stage again")
                StageRun(graph, node, node.directory, load_parent(node), splits, tracker).run(force)
                node.reload()
            results = measure_results(graph, splits, tracker)
            tracker.log(
                {f"results/{row.label}/{name}": value for row in results.rows for name, value in row.metrics.items()}
            )
    return results


def rehearse_alone(
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
) -> None:
    """Rehearse the stages that `run` would run, and leave nothing on the disk."""
    with raise_on_lost_peer():
        graph = resolve_graph(loaded)
        if pending := pending_stages(graph, first, last, force):
            rehearse(graph, pending, Splits(loaded.recipe, loaded.path.parent), reporter)
        else:
            reporter.info("rehearsal: every stage is unchanged; --force rehearses all")


def run_stage(
    loaded: LoadedRecipe,
    name: str,
    reporter: Reporter,
    *,
    parent: Path | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Path:
    """Run one stage and return its checkpoint's folder.

    Args:
        parent: checkpoint to start from; default: that of the parent in the run folder.
        output: where the result goes; default: the stage's folder in the run folder.

    Raises:
        SqatError: ``output`` holds something else than this stage's checkpoint, and there is no ``force``;
            or something that is no checkpoint.
    """
    directory = output or stage_directory(loaded, name)
    if output is not None:
        check_output(output, name, force)
    folder, file = lock_location(loaded.run_directory, directory)
    check_run_folder(folder)
    with (
        raise_on_lost_peer(),
        run_lock(folder, reporter, file),
        open_trackers(loaded.recipe, folder, reporter) as tracker,
    ):
        graph = resolve_graph(loaded)
        node = graph.nodes[name]
        may_skip = parent is None and output is None and not force
        if may_skip and node.is_current and check_unchanged(graph, node, tracker):
            return directory
        start = load_parent(node) if parent is None else load_checkpoint(parent)
        splits = Splits(loaded.recipe, loaded.path.parent)
        StageRun(graph, node, directory, start, splits, tracker).run(force)
    return directory


def check_output(output: Path, name: str, force: bool) -> None:
    """Raise SqatError where the output exists and is not a checkpoint of this stage, or with ``force`` of any stage."""
    check_stage_folder(output)
    if (output.parent / MANIFEST).is_file():
        raise SqatError("lies in another checkpoint", "choose another folder", str(output), code="output-exists")
    manifest = try_load_manifest(output)
    if force or not output.exists() or not any(output.iterdir()) or (manifest is not None and manifest.stage == name):
        return
    content = "no sqat checkpoint" if manifest is None else f"the checkpoint of stage {manifest.stage!r}"
    problem = f"the output exists and is {content}"
    raise SqatError(problem, "choose another folder or add --force", str(output), code="output-exists")


def check_unchanged(graph: StageGraph, node: StageNode, reporter: Reporter) -> bool:
    """Check the files and gates of a current stage; False where it misses a gate and may try again.

    Raises:
        GateError: it misses a gate and may not try again.
        SqatError: a file of its checkpoint is damaged.
    """
    manifest = node.manifest
    assert manifest is not None  # the stage is current
    verify_files(node.directory, manifest)
    limits = gate_limits(graph, node, node.parent_manifest)
    failure = broadcast_from_rank0(first_failed_gate(limits, manifest.metrics))
    if failure and manifest.attempt >= node.config.max_attempts:
        raise gate_error(node.name, failure, node.directory, keeps_older=False)
    if not failure:
        run_on_rank0(partial(remove_rejected, node.directory))
    reporter.info(f"{node.name}: unchanged" + (f", but it misses a gate: {failure}" if failure else ""))
    return not failure


def parent_manifest(loaded: LoadedRecipe, name: str, parent: Path | None) -> Manifest:
    """Load the manifest of the checkpoint that a stage starts from: the one in ``parent``, or the run folder's."""
    if parent is not None:
        return load_manifest(parent)
    before = loaded.recipe.parent_of(name)
    if before is None:
        problem = f"stage {name} has nothing to start from"
        raise SqatError(problem, "give --from CHECKPOINT", loaded.recipe.name, code="stage-order")
    return load_manifest(stage_directory(loaded, before))


def lock_location(run_directory: Path, directory: Path) -> tuple[Path, str]:
    """Return folder and lock file of a stage: in its run folder, or beside a checkpoint that lies elsewhere.

    The name alone shows a folder of another run's stage, as that run may be about to start.
    """
    path = directory.resolve()
    if run_directory.resolve() in path.parents:
        return run_directory, LOCK_FILE
    return path.parent, LOCK_FILE if STAGE_FOLDER.match(path.name) else f".{path.name}{LOCK_FILE}"


def evaluate(
    loaded: LoadedRecipe, artifact: Path, split: SplitName, reporter: Reporter, outputs_file: Path | None = None
) -> dict[str, float]:
    """Return the task's metrics of a checkpoint folder or an exported file on a split; train has none.

    Args:
        outputs_file: gets the outputs of the split's rows, as JSONL.
    """
    if outputs_file is not None:
        check_storable(loaded.recipe, split)
    reporter.info(f"evaluating {artifact} on {split}")
    splits = Splits(loaded.recipe, loaded.path.parent)
    outputs, rows = predict_artifact(artifact, splits, split)
    metrics = {} if split == "train" else splits.task.metrics(outputs, rows)
    if outputs_file is not None:
        content = format_outputs(loaded.recipe, splits.task, outputs, rows)
        run_on_rank0(partial(replace_file, outputs_file, content))
        reporter.info(f"wrote the outputs of {len(rows)} rows of {split} -> {outputs_file}")
    return metrics
