"""One stage's run: its attempts, their gates, and what is saved where.

Stages return checkpoints and save nothing. A result that passes its gates goes to the stage's folder, one that misses
a gate beside it. The state to resume from lies beside the folder until the result is saved. All ranks run the
stage; rank 0 writes and decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sqat.checkpoint.manifest import MANIFEST, Manifest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.distributed import broadcast_from_rank0, process_state, run_on_rank0
from sqat.errors import SqatError
from sqat.files.replace import remove_folder
from sqat.pipeline.fingerprint import input_digests, is_possible_attempt
from sqat.pipeline.graph import StageGraph, StageNode, try_load_manifest
from sqat.pipeline.quality_gates import Limit, first_failed_gate, gate_error, gate_limits, rejected_folder
from sqat.pipeline.run_folder import check_stage_folder, state_folder
from sqat.recipe.stages import TrainConfig
from sqat.stages import calibrate, export, prune, qat, reconstruct, train
from sqat.stages.context import StageContext
from sqat.tasks.splits import Splits
from sqat.training.health import saturation_warnings
from sqat.training.metrics_log import METRICS_FILE, MetricsLog
from sqat.training.resume_state import ResumeState
from sqat.training.tracking import TrackedReporter

STAGES: dict[str, Callable[[Any, Checkpoint | None, StageContext], Checkpoint]] = {
    "train": train.run,
    "prune": prune.run,
    "reconstruct": reconstruct.run,
    "calibrate": calibrate.run,
    "qat": qat.run,
    "export": export.run,
}


@dataclass(frozen=True)
class StageRun:
    """One stage about to run.

    Attributes:
        directory: where its result goes.
        parent: checkpoint that it starts from; None for the pretrained model.
    """

    graph: StageGraph
    node: StageNode
    directory: Path
    parent: Checkpoint | None
    splits: Splits
    reporter: TrackedReporter

    @property
    def parent_manifest(self) -> Manifest | None:
        """Manifest of the checkpoint that it starts from."""
        return None if self.parent is None else self.parent.manifest

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of what the result depends on: configuration, parent and teacher."""
        parent, teacher = self.parent_manifest, self.node.teacher_manifest
        return self.node.fingerprint_after(parent.fingerprint if parent else "", teacher.fingerprint if teacher else "")

    @cached_property
    def input_digests(self) -> dict[str, str]:
        """Digests of the manifests of parent and teacher."""
        return input_digests(self.parent_manifest, self.node.teacher_manifest)

    @cached_property
    def limits(self) -> list[Limit]:
        """What the result must reach."""
        return gate_limits(self.graph, self.node, self.parent_manifest)

    @property
    def state(self) -> Path:
        """Folder of the state to resume from."""
        return state_folder(self.directory)

    def info(self, text: str) -> None:
        """Report something about the stage."""
        self.reporter.info(f"{self.node.name}: {text}")

    def run(self, force: bool) -> None:
        """Run the stage until a result passes its gates, and put that in place.

        Args:
            force: start anew, without the state and the results of earlier attempts.

        Raises:
            GateError: the result of the last attempt misses a gate.
            SqatError: a metric that one of its gates compares with is missing.
        """
        process = process_state()
        check_stage_folder(self.directory)
        if force and process.is_main_process:
            ResumeState(self.state, "").remove()
        process.wait_for_everyone()
        earlier = None if force else self.find_earlier_result()
        process.wait_for_everyone()  # every rank has looked before rank 0 changes anything
        attempt = 1 if earlier is None else self.next_attempt(*earlier)
        if attempt is not None:
            self.run_attempts(attempt)

    def find_earlier_result(self) -> tuple[Path, Manifest] | None:
        """Find the last attempt of this very stage: set aside for missing a gate, or in its place."""
        folders = (rejected_folder(self.directory), self.directory)
        results = [(folder, manifest) for folder in folders if (manifest := try_load_manifest(folder)) is not None]
        return max(
            (result for result in results if self.could_make(result[1])),
            key=lambda result: result[1].attempt,
            default=None,
        )

    def could_make(self, manifest: Manifest) -> bool:
        """Tell whether an attempt of this very stage makes a checkpoint."""
        is_same = (manifest.fingerprint, manifest.input_digests) == (self.fingerprint, self.input_digests)
        return is_same and is_possible_attempt(manifest, self.node.config)

    def next_attempt(self, folder: Path, earlier: Manifest) -> int | None:
        """Choose the attempt after an earlier one; None where that passes the gates as they are now.

        Raises:
            GateError: it misses one, and was the last attempt.
        """
        failure = broadcast_from_rank0(first_failed_gate(self.limits, earlier.metrics))
        if failure and earlier.attempt >= self.node.config.max_attempts:
            keeps_older = self.directory.exists() and folder != self.directory
            raise gate_error(self.node.name, failure, folder, keeps_older=keeps_older)
        if failure:
            return earlier.attempt + 1
        if folder == self.directory:
            return 1
        run_on_rank0(partial(self.accept, folder))
        self.info(f"the result that was set aside passes the gates now -> {self.directory}")
        return None

    def accept(self, folder: Path) -> None:
        """Put a result that was set aside in place."""
        save_checkpoint(load_checkpoint(folder), self.directory)
        remove_folder(folder, MANIFEST)

    def run_attempts(self, first: int) -> None:
        """Run attempts from ``first`` on until a result passes the gates."""
        limits = self.limits  # read first: a missing metric is an error before any work
        last = self.node.config.max_attempts
        for attempt in range(first, last + 1):
            if attempt > 1:
                self.info(f"attempt {attempt} of {last}, with more steps")
            checkpoint = self.run_attempt(attempt)
            failure = broadcast_from_rank0(first_failed_gate(limits, checkpoint.manifest.metrics))
            folder = rejected_folder(self.directory) if failure else self.directory
            run_on_rank0(partial(self.save, checkpoint, folder))
            self.report(checkpoint.manifest, folder)
            if not failure:
                run_on_rank0(partial(remove_rejected, self.directory))
                return
            self.info(f"misses a gate: {failure}")
        raise gate_error(self.node.name, failure, folder, keeps_older=self.directory.exists())

    def run_attempt(self, attempt: int) -> Checkpoint:
        """Run one attempt and complete its manifest."""
        loaded, config, start = self.graph.loaded, self.node.config, time.monotonic()
        factor = config.retry_multiplier(attempt)
        settings = config.for_attempt(attempt) if isinstance(config, TrainConfig) else config
        context = StageContext(
            name=self.node.name,
            fingerprint=self.fingerprint,
            input_digests=self.input_digests,
            splits=self.splits,
            reporter=self.reporter,
            state=ResumeState(self.state, f"{self.fingerprint} {self.input_digests} steps x{factor:g}"),
            teacher=partial(load_teacher, self.node),
            log=MetricsLog(loaded.run_directory / METRICS_FILE, self.node.name, self.fingerprint, attempt),
        )
        checkpoint = STAGES[config.type](settings, self.parent, context)
        facts = {
            # the manifest of a resumed stage counts the seconds before the interruption too
            "seconds": round(max(checkpoint.manifest.seconds, time.monotonic() - start), 3),
            "recipe_file": loaded.path.name,
            "overrides": [*loaded.overrides],
            "attempt": attempt,
            "retry_multiplier": factor,
        }
        return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update=facts), recipe=loaded.text)

    def save(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Save a result; only then remove the state to resume from."""
        save_checkpoint(checkpoint, folder)
        ResumeState(self.state, "").remove()

    def report(self, manifest: Manifest, folder: Path) -> None:
        """Report a result's dev metrics and clipped activations."""
        for line in saturation_warnings(manifest) if manifest.type == "calibrate" else ():
            self.info(line)
        figures = manifest.metrics.get("dev", {})
        self.reporter.log({f"{self.node.name}/dev/{metric}": value for metric, value in figures.items()})
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items())
        self.info(f"{f'dev {shown}' if shown else 'done'} -> {folder}")


def load_parent(node: StageNode) -> Checkpoint | None:
    """Load the checkpoint in the run folder that a stage starts from; None for the pretrained model.

    Raises:
        SqatError: it is not there, or the recipe would make another one.
    """
    parent = node.parent
    if parent is None:
        return None
    place = str(parent.directory)
    if not parent.directory.is_dir():
        problem = f"stage {node.name} starts from stage {parent.name}, which has not run"
        hint = f"run `sqat run --to {node.name}`, or give --from CHECKPOINT"
        raise SqatError(problem, hint, place, code="stage-order")
    checkpoint = load_checkpoint(parent.directory)
    if checkpoint.manifest.fingerprint != parent.fingerprint:
        problem = f"stage {node.name} starts from stage {parent.name}, whose checkpoint is of another configuration"
        hint = f"run from an earlier stage: sqat run --from {parent.name}, or give --from CHECKPOINT"
        raise SqatError(problem, hint, place, code="stale-checkpoint")
    return checkpoint


def remove_rejected(directory: Path) -> None:
    """Delete the result that was set aside, if it is of the same stage and inputs as the one in place."""
    rejected, accepted = try_load_manifest(rejected_folder(directory)), try_load_manifest(directory)
    if rejected is not None and accepted is not None and is_same_stage(rejected, accepted):
        remove_folder(rejected_folder(directory), MANIFEST)


def is_same_stage(one: Manifest, other: Manifest) -> bool:
    """Whether two checkpoints are attempts of the same stage with the same inputs."""
    return (one.fingerprint, one.input_digests) == (other.fingerprint, other.input_digests)


def load_teacher(node: StageNode) -> Checkpoint:
    """Load the dense ancestor that teaches a stage."""
    if node.teacher is None:
        problem = f"stage {node.name} distils but has no dense ancestor"
        raise SqatError(problem, "add a train stage, or set distill.teacher", code="stage-order")
    return load_checkpoint(node.teacher.directory)
