"""The rehearsal of a run: each pending stage runs on a few rows and for one step before the first one runs for good.

The stages are the real ones, so they refuse now what they would refuse after hours. Results stay in memory, exported
files in a temporary folder. What depends on training is not judged: metrics, gates, decisions.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from sqat.checkpoint.store import Checkpoint, check_claims
from sqat.distributed import broadcast_from_rank0, run_on_rank0
from sqat.errors import SqatError, StoppedError, first_line
from sqat.export.traced_graphs import TracedGraphs
from sqat.files.read import try_read_object
from sqat.files.replace import replace_file
from sqat.pipeline.fingerprint import fingerprint
from sqat.pipeline.graph import StageGraph, StageNode
from sqat.pipeline.plan import check_groups, count_work
from sqat.pipeline.quality_gates import reference_manifest
from sqat.pipeline.result_files import REHEARSED_FILE
from sqat.pipeline.stage_run import STAGES, load_parent, load_teacher
from sqat.progress import Reporter, SilentReporter
from sqat.recipe.stages import PruneConfig, ReconstructConfig, StageConfig, TrainConfig
from sqat.stages.context import StageContext
from sqat.tasks.splits import Splits
from sqat.training.optimizer import learning_rate_factor
from sqat.training.resume_state import ResumeState

ROWS = 4  # of each split


class RehearsalError(Exception):
    """A fault of sqat, or of a library, that a rehearsal found."""


def rehearse_new(graph: StageGraph, pending: Sequence[StageNode], splits: Splits, reporter: Reporter) -> None:
    """Rehearse the pending stages, unless none of them trains, or all were rehearsed in this run folder before.

    Raises:
        SqatError: as `rehearse`.
    """
    if not any(isinstance(node.config, TrainConfig | ReconstructConfig) for node in pending):
        return
    path = graph.loaded.run_directory / REHEARSED_FILE
    remembered = broadcast_from_rank0(json.dumps(try_read_object(path, root=path.parent)))
    if {node.fingerprint for node in pending} <= {*json.loads(remembered).get("fingerprints", [])}:
        return
    rehearse(graph, pending, splits, reporter)
    content = json.dumps({"fingerprints": [node.fingerprint for node in pending]}, indent=2) + "\n"
    run_on_rank0(partial(replace_file, path, content.encode()))


def rehearse(graph: StageGraph, pending: Sequence[StageNode], splits: Splits, reporter: Reporter) -> None:
    """Run the pending stages on a few rows, in memory; what training draws afterwards stays the same.

    Raises:
        SqatError: a stage refuses something; its place says which stage, and the exit code is that of a real run.
    """
    start, count = time.monotonic(), f"{len(pending)} stage{'s' if len(pending) > 1 else ''}"
    reporter.info(f"rehearsal: {count}, one step on {ROWS} rows each; --no-rehearsal skips it")
    read_all_rows(splits)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), tempfile.TemporaryDirectory(prefix="sqat-") as scratch:
        Rehearsal(graph, pending, splits, Path(scratch)).run()
    reporter.info(f"rehearsal: {count} pass ({time.monotonic() - start:.1f} s)")


def read_all_rows(splits: Splits) -> None:
    """Read and check each row of each split, which the run needs in any case."""
    for name in ("train", "dev", "test"):
        if name != "test" or splits.recipe.data.test is not None:
            splits.task.encode(splits.rows(name))


@dataclass
class Rehearsal:
    """The pending stages as they are rehearsed.

    Attributes:
        keys: stage -> what its rehearsal depends on; stages of equal keys are rehearsed once.
        results: key -> checkpoint that a later stage needs.
    """

    graph: StageGraph
    pending: Sequence[StageNode]
    splits: Splits
    scratch: Path
    keys: dict[str, str] = field(default_factory=dict)
    results: dict[str, Checkpoint] = field(default_factory=dict)
    graphs: TracedGraphs = field(default_factory=TracedGraphs)

    def run(self) -> None:
        """Rehearse each stage that differs from those before it.

        Raises:
            SqatError: a stage refuses something.
        """
        few = self.splits.first_rows(ROWS)
        different = {self.key_of(node): node for node in reversed(self.pending)}  # of equal ones, the first
        for number, node in enumerate(self.pending):
            if different[self.key_of(node)] is not node:
                continue
            with named(node):
                self.check_recipe(node)
                self.results[self.key_of(node)] = self.run_stage(node, few)
            later = self.pending[number + 1 :]
            needed = {self.key_of(other) for after in later for other in (after.parent, after.teacher)}
            self.results = {key: result for key, result in self.results.items() if key in needed}

    def key_of(self, node: StageNode | None) -> str:
        """Return the fingerprint of a stage as it is rehearsed; of one that does not run, that of its checkpoint."""
        if node is None:
            return ""
        if node not in self.pending:
            return node.fingerprint
        if node.name not in self.keys:
            inputs = (self.key_of(other) for other in (node.parent, node.teacher))
            self.keys[node.name] = fingerprint(shorten(node.config, self.splits), {}, *inputs)
        return self.keys[node.name]

    def check_recipe(self, node: StageNode) -> None:
        """Check what a few rows do not show: the size of batches, and stages that gates compare with."""
        config = node.config
        if isinstance(config, TrainConfig):
            check_groups(self.splits, config)
        for gate in config.gates.values():
            other = self.graph.nodes[gate.against] if gate.against else None
            if other is not None and other not in self.pending:
                reference_manifest(node, other)

    def run_stage(self, node: StageNode, few: Splits) -> Checkpoint:
        """Run one stage. What it refuses with another model's graph, it must refuse with its own."""
        self.graphs.is_used = False
        try:
            return self.run_with(self.graphs, node, few)
        except SqatError:
            if not self.graphs.is_used:
                raise
        return self.run_with(None, node, few)

    def run_with(self, graphs: TracedGraphs | None, node: StageNode, few: Splits) -> Checkpoint:
        """Run one stage, with the graphs that were traced before or without."""
        parent = self.results[self.key_of(node.parent)] if node.parent in self.pending else load_parent(node)
        folder = self.scratch / node.name
        context = StageContext(
            name=node.name,
            fingerprint=self.key_of(node),
            input_digests={},
            splits=few,
            reporter=SilentReporter(),
            state=ResumeState(folder, ""),
            teacher=partial(self.teacher_of, node),
            graphs=graphs,
        )
        config = shorten(node.config, self.splits)
        checkpoint = STAGES[config.type](config, parent, context)
        check_claims(checkpoint, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return checkpoint

    def teacher_of(self, node: StageNode) -> Checkpoint:
        """Return the checkpoint that teaches a stage."""
        return self.results[self.key_of(node.teacher)] if node.teacher in self.pending else load_teacher(node)


def shorten(config: StageConfig, splits: Splits) -> StageConfig:
    """Return the settings of a stage that trains for the first step only, at the rate that this step has."""
    if isinstance(config, ReconstructConfig):
        return config.model_copy(update={"steps_per_block": 1})
    if not isinstance(config, TrainConfig):
        return config
    steps = count_work(config, splits)[0] or 0
    first_step: dict[str, object] = {
        "steps": min(1, steps),
        "epochs": None,
        "gradient_accumulation": 1,
        "learning_rate": config.learning_rate * learning_rate_factor(config, 0, steps),
        "lr_schedule": "constant",
        "warmup": 0.0,
        "evaluate_every": None,
        "early_stopping": None,
        "keep_checkpoint": "last",
        "save_every": math.inf,
    }
    if isinstance(config, PruneConfig) and config.reconstruct is not None:
        first_step["reconstruct"] = config.reconstruct.model_copy(update={"steps_per_block": 1})
    return config.model_copy(update=first_step)


@contextmanager
def named(node: StageNode) -> Iterator[None]:
    """Say in each error that the rehearsal of a stage found it."""
    place = f"rehearsal of stage {node.name}"
    try:
        yield
    except StoppedError:
        raise StoppedError(place, "stopped; run the same command again", code="stopped") from None
    except SqatError as error:
        place = f"{place}: {error.place}" if error.place else place
        raise type(error)(error.problem, error.hint, place, code=error.code) from error
    except OSError:  # a full disk: its own words name the file
        raise
    except Exception as error:
        problem = f"{place}: {type(error).__name__}: {first_line(error)}; the run has made no training step"
        raise RehearsalError(problem) from error
