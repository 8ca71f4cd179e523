"""Take one family through the command line: train, prune, each placement, qat, each target.

Train and prune run once: the recipe of each placement is the same one with another ``placement``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from scripts.families.graphs import shared_graphs
from scripts.families.registry import FAMILIES, LONGEST, Family
from scripts.families.source import write_source, write_splits
from sqat.cli.commands import app
from sqat.errors import SqatError
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.targets import TARGETS

TASKS = {"text": "classification", "image": "image-classification"}
OUTPUTS_ONLY = {"minilm_weight": 0, "output_weight": 1}
FIT = {"steps": 2, "batch_size": 8, "learning_rate": 1e-4}
REHEARSAL = "rehearsal of stage "  # place of what a rehearsal refuses
UNCHANGED = 1e-30  # a learning rate with which qat does all its work and moves no weight: one float graph for all


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        end: ``works``, ``refused`` (by a line before the first step), ``late`` (by a line after it), or ``fault``.
        stage: that was running, or was rehearsed; empty where none was.
        code: of the SqatError, or the exception's class.
        where: last line of sqat's own code; of faults alone.
    """

    end: str
    stage: str = ""
    code: str = ""
    message: str = ""
    where: str = ""


@dataclass
class Record:
    """What is known of one family, as the JSON file has it.

    Attributes:
        distillation: how the default one ends; where it is refused, qat learns from outputs alone.
        layers: number of linears and convolutions.
        dense: why layers are not pruned -> how many.
        placements: placement -> why layers stay in float and how many, number of sites, notes, and outcome of each
            target.
    """

    name: str
    model_type: str
    kind: str
    distillation: dict[str, str] = field(default_factory=lambda: {"end": "works"})
    layers: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    placements: dict[str, dict[str, Any]] = field(default_factory=dict)


def try_family(
    name: str, folder: Path, placements: Sequence[str] = tuple(PLACEMENTS), targets: Sequence[str] = tuple(TARGETS)
) -> Record:
    """Take a family through all stages, with each placement and each target that goes with it."""
    torch.set_num_threads(1)
    family = FAMILIES[name]
    record = Record(name, family.model_type, family.kind)
    write_source(folder / "model", name)
    files = write_splits(folder, family)
    with shared_graphs():
        for placement in placements:
            fitting = [target for target in targets if fits(target, placement)]
            record.placements[placement] = try_placement(record, folder, family, files, placement, fitting)
    return record


def fits(target: str, placement: str) -> bool:
    """Say whether a target depends on the placement: those without scales are written with the first alone."""
    if not TARGETS[target].needs_scales:
        return placement == "linear"
    return placement in (TARGETS[target].placements or PLACEMENTS)


def try_placement(
    record: Record, folder: Path, family: Family, files: Mapping[str, str], placement: str, targets: Sequence[str]
) -> dict[str, Any]:
    """Run the recipe of one placement with all its targets; where that fails, with each of them alone."""
    recipe = folder / "family.yaml"

    def attempt(targets: Sequence[str]) -> Outcome:
        content = recipe_of(family, folder, files, placement, targets, record.distillation["end"] == "works")
        recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        rehearsal = ["--no-rehearsal"] if record.placements else []  # one of them passes, where a family works
        outcome = run_command("run", str(recipe), "--quiet", *rehearsal)
        if outcome.end != "refused" or not outcome.stage or outcome.message.startswith(REHEARSAL):
            return outcome
        told = run_command("run", str(recipe), "--quiet", "--rehearse", "--force")
        return replace(outcome, end="late") if told.end == "works" else told

    whole = attempt(targets)
    if is_about_distillation(whole) and record.distillation["end"] == "works":
        record.distillation = short(whole)
        whole = attempt(targets)
    each = dict.fromkeys(targets, whole)
    if whole.end != "works" and whole.stage == "export" and len(targets) > 1:
        each = {target: attempt([target]) for target in targets}
    facts = describe(record, folder / "runs" / "family", placement)
    return {**facts, "targets": {target: short(outcome) for target, outcome in each.items()}}


def is_about_distillation(outcome: Outcome) -> bool:
    """Say whether a run ended because q, k and v cannot be learned from the dense model."""
    words = ("MiniLM", "distill", "q, k", "attention")
    return outcome.stage == "qat" and (outcome.end == "fault" or any(word in outcome.message for word in words))


def recipe_of(
    family: Family, folder: Path, files: Mapping[str, str], placement: str, targets: Sequence[str], default: bool
) -> dict[str, Any]:
    """Return the recipe that a user of the family writes, with few steps.

    Args:
        default: of distillation; else from outputs alone.
    """
    columns = {"columns": {"image": "x", "label": "y"}} if family.kind == "image" else {}
    distill = {} if default else {"distill": OUTPUTS_ONLY}
    return {
        "name": "family",
        "output": str(folder / "runs"),
        "model": {"source": "model", "max_length": LONGEST},
        "task": TASKS[family.kind],
        "data": {**files, **columns},
        "stages": {
            "train": FIT,
            "prune": {**FIT, "schedule": {"name": "per-group", "num_masks": 1}},
            "calibrate": {"placement": placement, "samples": 16},
            "qat": {**FIT, "learning_rate": UNCHANGED, **distill},
            "export": {"targets": list(targets), "parity_samples": 8},
        },
    }


def run_command(*arguments: str) -> Outcome:
    """Run a command of sqat in this process."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(args=list(arguments), prog_name="sqat", standalone_mode=False)
    except SqatError as error:
        place = error.place.partition(":")[0]
        stage = place.removeprefix(REHEARSAL) if place.startswith(REHEARSAL) else ""
        return Outcome("refused", stage or running_stage(error.__traceback__), error.code, without_folders(str(error)))
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sqat/" in frame.filename]
        where = f"{own[-1].filename.rpartition('/sqat/')[2]}:{own[-1].lineno} {own[-1].name}" if own else ""
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        message = without_folders(message[:300])
        return Outcome("fault", running_stage(error.__traceback__), type(error).__name__, message, where)
    return Outcome("works")


def without_folders(message: str) -> str:
    """Return a message without the temporary folders that it names."""
    return re.sub(r"/\S*/(?:sqat-\w+/)?(?=[\w.-]+)", "", message) if "/sqat-" in message else message


def running_stage(trace: TracebackType | None) -> str:
    """Return the name of the stage that an exception ended; empty where none was running."""
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_filename.endswith("rehearsal.py") and frame.f_code.co_name == "run_with":
            return str(frame.f_locals["node"].name)
        if frame.f_code.co_name == "run_attempt":
            return str(frame.f_locals["self"].node.name)
        trace = trace.tb_next
    return ""


def short(outcome: Outcome) -> dict[str, str]:
    """Return the entries of an outcome that say something."""
    return {name: value for name, value in asdict(outcome).items() if value}


def describe(record: Record, run: Path, placement: str) -> dict[str, Any]:
    """Return what the calibrated checkpoint says of layers and sites; empty where there is none of this placement."""
    path = next(iter(sorted(run.glob("??-calibrate/sqat.json"))), None)
    manifest = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    if manifest.get("placement") != placement:
        return {}
    layers = manifest["layers"]
    record.layers = len(layers)
    record.dense = count_reasons(layers, "dense_because")
    return {
        "float": count_reasons(layers, "float_because"),
        "sites": len(manifest["sites"]),
        "notes": manifest["notes"],
    }


def count_reasons(layers: Mapping[str, Mapping[str, str]], entry: str) -> dict[str, int]:
    """Count the layers that have each reason; the shape that a reason begins with is left out."""
    reasons = (re.sub(r"^\[\d+, \d+\] is ", "", layer[entry]) for layer in layers.values() if layer[entry])
    return dict(Counter(reasons))
