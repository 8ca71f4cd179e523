"""`sqat analyze`: choose the checkpoint and the rows, and measure all layers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from sqat.analyze.budget import Step, largest_first, list_steps, max_tries, skip_steps
from sqat.analyze.findings import (
    BudgetChoice,
    Findings,
    LayerFinding,
    Sensitivity,
    Shares,
    format_layers,
    share_of,
)
from sqat.analyze.options import Options, Sections, choose_sections
from sqat.analyze.sensitivity import OUTPUT_LOSS, Probe, choose_measure, run_model
from sqat.analyze.treatments import Pruning, Quantization, find_pruning, find_quantization
from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.data.rows import Rows, column
from sqat.errors import SqatError
from sqat.files.replace import replace_file
from sqat.models.layer_selection import weighted_layers
from sqat.pipeline.graph import StageNode, resolve_graph
from sqat.progress import Reporter
from sqat.recipe.schema import LoadedRecipe
from sqat.stages.context import StageContext
from sqat.tasks.splits import Splits
from sqat.training.resume_state import ResumeState


def run_analysis(loaded: LoadedRecipe, options: Options, reporter: Reporter) -> Findings:
    """Treat each layer alone and all together, and choose layers within a budget where there is one; write nothing.

    Args:
        options: checked by `check_options`.

    Raises:
        SqatError: there is no dense checkpoint to start from.
    """
    begun = time.monotonic()
    node = None if options.start is not None else choose_analyzed_stage(loaded, options.stage)
    sections = choose_sections(loaded.recipe, None if node is None else node.name, options)
    directory = options.start if node is None else node.directory
    assert directory is not None
    parent = plain_checkpoint(directory)
    context = make_context(loaded, parent, directory, reporter)
    findings = analyze(context, parent, sections, options)
    return findings.model_copy(update={"checkpoint": str(directory), "seconds": round(time.monotonic() - begun, 3)})


def choose_analyzed_stage(loaded: LoadedRecipe, name: str | None) -> StageNode:
    """Choose the stage whose checkpoint is analyzed: the named one, or the last train stage that has run.

    Raises:
        SqatError: it has not run, or the recipe would make another checkpoint.
    """
    graph = resolve_graph(loaded)
    trained = [node for node in graph.nodes.values() if node.config.type == "train"]
    node = graph.nodes[name] if name else next((node for node in reversed(trained) if node.manifest), None)
    if node is None:
        todo = f"run `sqat run --to {trained[0].name}`, or give" if trained else "give"
        hint = f"{todo} --from CHECKPOINT"
        raise SqatError("no train stage has run yet", hint, loaded.recipe.name, code="stage-order")
    todo, place = f"run `sqat run --to {node.name}`", str(node.directory)
    if node.manifest is None:
        raise SqatError(f"stage {node.name} has not run yet", todo, place, code="stage-order")
    if node.manifest.fingerprint != node.fingerprint:
        problem = f"the checkpoint of stage {node.name} is of another configuration"
        raise SqatError(problem, f"{todo}, or give --from CHECKPOINT", place, code="stale-checkpoint")
    return node


def plain_checkpoint(directory: Path) -> Checkpoint:
    """Load a checkpoint that is neither pruned nor calibrated.

    Raises:
        SqatError: it is, so that the sensitivity of its dense layers cannot be measured.
    """
    checkpoint = load_checkpoint(directory)
    if checkpoint.masks or checkpoint.amax:
        state = "calibrated" if checkpoint.amax else "pruned"
        raise SqatError(f"the checkpoint is already {state}", "start from a train stage", str(directory),
                        code="stage-order")  # fmt: skip
    if not checkpoint.weights:
        raise SqatError("it is an export without torch weights", "start from a train stage", str(directory),
                        code="not-a-checkpoint")  # fmt: skip
    return checkpoint


def make_context(loaded: LoadedRecipe, parent: Checkpoint, directory: Path, reporter: Reporter) -> StageContext:
    """Make the context that stages get; nothing is trained, so there is no resume state."""
    splits = Splits(loaded.recipe, loaded.path.parent)
    unused = ResumeState(directory / "unused", "")
    return StageContext("analyze", "", {}, splits, reporter, unused, lambda: parent)


def analyze(context: StageContext, parent: Checkpoint, sections: Sections, options: Options) -> Findings:
    """Measure everything; the caller fills in the checkpoint and the seconds."""
    model, processor = context.load_model(parent)
    split: Literal["train", "dev"] = "train" if options.split == "train" else "dev"
    rows = choose_rows(context.splits.prepared(split, processor), options.samples, context.recipe.seed)
    context.reporter.info(f"measuring the untreated model on {len(rows)} rows of {split}")
    plain, metric = run_model(model, processor, rows), options.metric or OUTPUT_LOSS
    measure = choose_measure(context.task, metric, plain, rows)  # raises for an unknown metric, before the longer work
    quantization, pruning = Quantization(), Pruning()
    if sections.calibrate is not None:
        context.reporter.info(f"calibrating as stage {sections.calibrate_stage} does")
        quantization = find_quantization(model, sections.calibrate, context, processor)
    if sections.prune is not None:
        context.reporter.info(f"choosing masks as stage {sections.prune_stage} does")
        pruning = find_pruning(model, sections.prune, context, processor)
    probe = Probe(model, processor, rows, pruning, quantization, measure, context.reporter)
    tries = 0 if options.budget is None else max_tries(len(pruning.masks) + len(quantization.layers))
    context.reporter.start("analyze layers", 3 * len(probe.layers) + 3 + tries)
    alone = {name: probe.sensitivity([name]) for name in probe.layers}
    together, sizes = probe.sensitivity(probe.layers), probe.measure_sizes()
    choice = None if options.budget is None else choose_within(options.budget, probe, alone, sections, sizes)
    context.reporter.finish()
    return Findings(
        checkpoint="",
        prune=sections.prune_stage,
        calibrate=sections.calibrate_stage,
        measure=metric,
        split=split,
        rows=len(rows),
        plain=context.task.metrics(plain, rows),
        layers=describe_layers(probe, alone, sizes),
        together=together,
        summed=Sensitivity.sum([*alone.values()]),
        sparse=share_of(sizes, pruning.masks),
        int8=share_of(sizes, quantization.layers),
        choice=choice,
        notes=sections.notes(),
        seconds=0.0,
    )


def describe_layers(probe: Probe, alone: Mapping[str, Sensitivity], sizes: Mapping[str, Shares]) -> list[LayerFinding]:
    """A finding for each layer, the most sensitive first."""
    modules = weighted_layers(probe.model)
    return [
        LayerFinding(
            name=name,
            shape=[*modules[name].weight.shape],
            pattern=probe.pruning.patterns.get(name, ""),
            weights=sizes[name].weights,
            multiply_adds=sizes[name].multiply_adds,
            sensitivity=alone[name],
        )
        for name in sorted(alone, key=lambda name: largest_first(alone[name].both))
    ]


def choose_within(
    budget: float, probe: Probe, alone: Mapping[str, Sensitivity], sections: Sections, sizes: Mapping[str, Shares]
) -> BudgetChoice:
    """Choose which layers to leave dense and float, and write the sections of the recipe that say so."""
    steps = list_steps(alone)
    skipped, measured = skip_steps(budget, steps, lambda taken: probe.measure_treated(*layers_of(taken)))
    dense, float_layers = layers_of(skipped)
    pruned = [name for name in probe.pruning.masks if name not in dense]
    int8 = [name for name in probe.quantization.layers if name not in float_layers]
    recipe: dict[str, str | None] = {}
    if sections.prune_stage and sections.prune:
        recipe[sections.prune_stage] = format_layers(sections.prune.layers, dense) if pruned else None
    if sections.calibrate_stage and sections.calibrate:
        recipe[sections.calibrate_stage] = format_layers(sections.calibrate.layers, float_layers) if int8 else None
    return BudgetChoice(
        budget=budget,
        dense=dense,
        float_layers=float_layers,
        predicted=sum(step.sensitivity for step in steps[len(skipped) :]),
        measured=measured,
        sparse=share_of(sizes, pruned),
        int8=share_of(sizes, int8),
        recipe=recipe,
    )


def layers_of(steps: Sequence[Step]) -> tuple[list[str], list[str]]:
    """Layers that steps prune, and layers that they quantize."""
    pruned = [step.layer for step in steps if step.kind == "pruned"]
    return pruned, [step.layer for step in steps if step.kind == "int8"]


def choose_rows(rows: Rows, samples: int, seed: int) -> Rows:
    """Draw at least ``samples`` rows by the seed; all passages of a query come together."""
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
    """Write the findings as JSON and as a plot, where files are named."""
    if json_file is not None:
        replace_file(json_file, f"{findings.model_dump_json(indent=1)}\n".encode())
    if plot is not None:
        from sqat.analyze.plot import save_plot

        save_plot(findings, plot)
