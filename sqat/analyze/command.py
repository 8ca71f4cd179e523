"""`sqat analyze`: where it starts, which rows it measures on, and all that it finds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sqat.analyze.budget import Step, keep_within, list_steps, most_tries, worst_first
from sqat.analyze.findings import Choice, Findings, Harm, LayerFinding, Sizes, tell_choice
from sqat.analyze.options import Options, Sections, choose_sections
from sqat.analyze.sensitivity import OUTPUT_LOSS, Damages, Probe, make_judge, run_model, total
from sqat.analyze.treatments import Pruning, Rounding, find_pruning, find_rounding
from sqat.checkpoint.atomic_write import replace_file
from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.data.rows import Rows, column
from sqat.errors import SqatError
from sqat.models.layer_selection import weighted_layers
from sqat.pipeline.fingerprint import Keys
from sqat.progress import Reporter
from sqat.recipe.schema import LoadedRecipe
from sqat.stages.context import StageContext
from sqat.tasks.splits import Splits
from sqat.training.resume_state import ResumeState


def run_analysis(loaded: LoadedRecipe, options: Options, reporter: Reporter) -> Findings:
    """Treat each layer alone, all of them, and with a budget the fewest that break it; write nothing.

    Args:
        options: that `check_options` has let pass.

    Raises:
        SqatError: no checkpoint to start from, or one that is not plain.
    """
    begun, name = time.monotonic(), None if options.start is not None else start_stage(loaded, options.stage)
    sections = choose_sections(loaded.recipe, name, options)
    directory = options.start if name is None else Keys(loaded).directory(name)
    assert directory is not None
    parent = plain_checkpoint(directory)
    context = make_context(loaded, parent, directory, reporter)
    findings = analyze(context, parent, sections, options)
    return findings.model_copy(update={"checkpoint": str(directory), "seconds": round(time.monotonic() - begun, 3)})


def start_stage(loaded: LoadedRecipe, wanted: str | None) -> str:
    """The stage whose checkpoint is analyzed: the one named, or the last train stage that has run.

    Raises:
        SqatError: it has not run, or the recipe would not make its checkpoint any more.
    """
    keys, stages = Keys(loaded), loaded.recipe.stages
    trained = [name for name, config in stages.items() if config.type == "train"]
    name = wanted or next((name for name in reversed(trained) if keys.manifest(name) is not None), None)
    if name is None:
        todo = f"run `sqat run --to {trained[0]}`, or give" if trained else "give"
        raise SqatError("no train stage has run yet", f"{todo} --from CHECKPOINT", loaded.recipe.name)
    directory, manifest = keys.directory(name), keys.manifest(name)
    if manifest is None:
        raise SqatError(f"stage {name} has not run yet", f"run `sqat run --to {name}`", str(directory))
    if manifest.key != keys.planned[name]:
        raise SqatError(f"this recipe would not make the checkpoint of stage {name} any more",
                        f"run `sqat run --to {name}`, or give --from CHECKPOINT", str(directory))  # fmt: skip
    return name


def plain_checkpoint(directory: Path) -> Checkpoint:
    """A checkpoint that is neither pruned nor calibrated.

    Raises:
        SqatError: it is, so that what its layers would suffer cannot be told any more.
    """
    checkpoint = load_checkpoint(directory)
    if checkpoint.masks or checkpoint.amax:
        done = "calibrated" if checkpoint.amax else "pruned"
        raise SqatError(f"the checkpoint is already {done}", "start from a train stage", str(directory))
    if not checkpoint.weights:
        raise SqatError("is an export without torch weights", "start from a train stage", str(directory))
    return checkpoint


def make_context(loaded: LoadedRecipe, parent: Checkpoint, directory: Path, reporter: Reporter) -> StageContext:
    """The surroundings that stages are given; nothing is saved, so the mid-stage state is never used."""
    splits = Splits(loaded.recipe, loaded.path.parent)
    unused = ResumeState(directory / "unused", "")
    return StageContext(loaded.recipe, loaded.path.parent, "analyze", "", {}, splits, reporter, unused, lambda: parent)


def analyze(context: StageContext, parent: Checkpoint, sections: Sections, options: Options) -> Findings:
    """The findings, but for the place and the time."""
    model, processor = context.load_model(parent)
    split: Literal["train", "dev"] = "train" if options.split == "train" else "dev"
    rows = choose_rows(context.splits.prepared(split, processor), options.samples, context.recipe.seed)
    context.reporter.info(f"measuring the model as it is on {len(rows)} rows of {split}")
    plain, damage = run_model(model, processor, rows), options.metric or OUTPUT_LOSS
    judge = make_judge(context.task, damage, plain, rows)  # tells a metric that is none, before the longer work
    rounding, pruning = Rounding(), Pruning()
    if sections.calibrate is not None:
        context.reporter.info(f"calibrating as stage {sections.calibrate[0]} does")
        rounding = find_rounding(model, sections.calibrate[1], context, processor)
    if sections.prune is not None:
        context.reporter.info(f"choosing masks as stage {sections.prune[0]} does")
        pruning = find_pruning(model, sections.prune[1], context, processor)
    probe = Probe(model, processor, rows, pruning, rounding, judge, context.reporter)
    tries = 0 if options.budget is None else most_tries(len(pruning.masks) + len(rounding.layers))
    context.reporter.start("analyze layers", 3 * len(probe.layers) + 3 + tries)
    damages = {name: probe.damages([name]) for name in probe.layers}
    together, sizes = probe.damages(probe.layers), Sizes.of(probe)
    choice = None if options.budget is None else choose(options.budget, probe, damages, sections, sizes)
    context.reporter.finish()
    facts = {"damage": damage, "split": split, "rows": len(rows), "plain": context.task.metrics(plain, rows)}
    return tell_findings(probe, damages, together, sizes, choice, sections, facts)


def choose(budget: float, probe: Probe, damages: Mapping[str, Damages], sections: Sections, sizes: Sizes) -> Choice:
    """What to leave dense and float for a budget."""
    kept = keep_within(budget, list_steps(damages), lambda steps: probe.damage(*split_steps(steps)))
    both = {"pruned": sections.prune, "int8": sections.calibrate}
    layers = {kind: (found[0], found[1].layers) for kind, found in both.items() if found is not None}
    return tell_choice(budget, kept, treated_layers(probe), layers, sizes)


def treated_layers(probe: Probe) -> dict[str, list[str]]:
    """Treatment -> the layers that can get it."""
    return {"pruned": [*probe.pruning.masks], "int8": probe.rounding.layers}


def tell_findings(
    probe: Probe,
    damages: Mapping[str, Damages],
    together: Damages,
    sizes: Sizes,
    choice: Choice | None,
    sections: Sections,
    facts: Mapping[str, Any],
) -> Findings:
    """All that was measured; the layers with the largest damage first."""
    modules, patterns, treated = weighted_layers(probe.model), probe.pruning.patterns, treated_layers(probe)
    layers = [LayerFinding(name=name, shape=[*modules[name].weight.shape], pattern=patterns.get(name, ""),
                           weights=sizes.weights[name], multiply_adds=sizes.multiply_adds[name],
                           damage=Harm.of(damages[name]))
              for name in sorted(damages, key=lambda name: worst_first(damages[name].both))]  # fmt: skip
    return Findings(
        checkpoint="",
        prune=None if sections.prune is None else sections.prune[0],
        calibrate=None if sections.calibrate is None else sections.calibrate[0],
        layers=layers,
        together=Harm.of(together),
        summed=Harm.of(total([*damages.values()])),
        sparse=sizes.share_of(treated["pruned"]),
        int8=sizes.share_of(treated["int8"]),
        choice=choice,
        notes=sections.notes(),
        seconds=0.0,
        **facts,
    )


def split_steps(steps: Sequence[Step]) -> tuple[list[str], list[str]]:
    """Layers that are pruned and layers that are int8 once the steps are done."""
    kinds = ("pruned", "int8")
    pruned, int8 = ([step.layer for step in steps if step.kind == kind] for kind in kinds)
    return pruned, int8


def choose_rows(rows: Rows, samples: int, seed: int) -> Rows:
    """At least ``samples`` rows (or all), drawn by the seed; a query's passages come with it, all of them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if "group" not in rows.column_names:
        return rows.select(sorted(order[:samples]))
    groups = column(rows, "group").tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    chosen: list[int] = []
    for group in dict.fromkeys(groups[row] for row in order):
        if len(chosen) >= samples:
            break
        chosen += members[group]
    return rows.select(sorted(chosen))


def write_findings(findings: Findings, json_file: Path | None, plot: Path | None) -> None:
    """Write the findings as JSON and as a plot, where files are named.

    Raises:
        SqatError: a file cannot be written, or the plot not be drawn here.
    """
    if json_file is not None:
        replace_file(json_file, f"{findings.model_dump_json(indent=1)}\n".encode())
    if plot is not None:
        from sqat.analyze.plot import save_plot

        save_plot(findings, plot)
