"""The rules between the parts of a recipe: which stage may start from which, which names must exist.

Each rule yields the path of its key, so that the error can name the line. Files and columns are checked where the
data are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sqat.errors import suggest
from sqat.recipe.inputs import Columns
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import (
    CalibrateConfig,
    DenseTrainConfig,
    DistillConfig,
    ExportConfig,
    PruneConfig,
    QatConfig,
    ReconstructConfig,
    TrainConfig,
    reconstructs,
)
from sqat.recipe.targets import TARGETS, unmet_need
from sqat.recipe.tasks import TASKS
from sqat.recipe.teacher import TeacherConfig
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules import Schedule

# The stages that a stage of a type must not follow, as it would undo their work.
UNDONE_BY = {"train": {"prune", "calibrate", "qat"}, "prune": {"calibrate", "qat"}}


class Problem(NamedTuple):
    """A broken rule: the path of its key, what is wrong, what to do."""

    path: tuple[str, ...]
    text: str
    hint: str = ""


def check_recipe(recipe: Recipe) -> list[Problem]:
    """Return all broken rules; stages are checked only where all parents are valid."""
    parents = list(check_parents(recipe))
    stages = [] if parents else [problem for name in recipe.stages for problem in check_stage(recipe, name)]
    return [
        *parents,
        *stages,
        *check_results(recipe),
        *check_columns(recipe),
        *check_batch_sizes(recipe),
        *check_task_inputs(recipe),
        *check_streaming(recipe),
    ]


def check_parents(recipe: Recipe) -> Iterator[Problem]:
    """A stage starts from an earlier one that is no export."""
    earlier: list[str] = []
    for name, stage in recipe.stages.items():
        path, parent = ("stages", name, "from"), stage.parent
        possible = [other for other in earlier if not isinstance(recipe.stages[other], ExportConfig)]
        if parent is not None and parent not in earlier:
            what = "is not a stage before it" if parent in recipe.stages else "is no stage"
            yield Problem(path, f"stage {name!r} starts from {parent!r}, which {what}", suggest(parent, possible))
        elif parent is not None and parent not in possible:
            text = f"stage {name!r} starts from {parent!r}, an export, which holds no model to train"
            yield Problem(path, text, suggest(parent, possible))
        earlier.append(name)


def check_stage(recipe: Recipe, name: str) -> Iterator[Problem]:
    """A stage fits its ancestors."""
    stage, ancestors = recipe.stages[name], recipe.ancestors_of(name)
    types = {recipe.stages[other].type for other in ancestors}
    path = ("stages", name)
    if undone := UNDONE_BY.get(stage.type, set()) & types:
        first = next(other for other in ancestors if recipe.stages[other].type in undone)
        text = f"stage {name!r} would undo stage {first!r} {describe_ancestors(ancestors)}"
        yield Problem((*path, "from"), text, "the order is train, prune, calibrate, qat, export")
    if isinstance(stage, QatConfig) and "calibrate" not in types:
        text = f"stage {name!r} has no calibrate stage among its ancestors {describe_ancestors(ancestors)}"
        yield Problem((*path, "from"), text, "add a calibrate stage before it")
    if reconstructs(stage):
        yield from check_reconstruction(recipe, name)
    if isinstance(stage, ExportConfig):
        yield from check_targets(recipe, name, stage)
    yield from check_gates(recipe, name)
    if isinstance(stage, PruneConfig):
        yield from check_schedule(path, stage)
    if isinstance(stage, PruneConfig | QatConfig) and stage.distill is not None:
        yield from check_distillation(recipe, name, stage.distill)


def check_reconstruction(recipe: Recipe, name: str) -> Iterator[Problem]:
    """A stage that reconstructs has masks that stay, and a dense ancestor to learn from."""
    stage, ancestors, path = recipe.stages[name], recipe.ancestors_of(name), ("stages", name)
    if recipe.dense_ancestor_of(name) is None:
        text = f"stage {name!r} has no train stage among its ancestors {describe_ancestors(ancestors)} to reconstruct"
        yield Problem(path, text, "add a train stage before it (steps: 0 for the model as it is)")
    if isinstance(stage, ReconstructConfig) and not {"prune", "calibrate"} & {recipe.stages[a].type for a in ancestors}:
        text = f"stage {name!r} has no prune or calibrate stage among its ancestors {describe_ancestors(ancestors)}"
        yield Problem((*path, "from"), text, "add a prune stage before it")
    if isinstance(stage, PruneConfig) and stage.schedule.every_step:
        text = f"{'.'.join(path)}: schedule {stage.schedule.name} changes masks in every step, reconstruct keeps them"
        yield Problem((*path, "reconstruct"), text, "choose the schedule per-group, or add a reconstruct stage")


def check_targets(recipe: Recipe, name: str, stage: ExportConfig) -> Iterator[Problem]:
    """Each target can express what the ancestors of the export did."""
    path, ancestors = ("stages", name, "targets"), recipe.ancestors_of(name)
    configs = [recipe.stages[other] for other in ancestors]
    placement = next((config.placement for config in configs if isinstance(config, CalibrateConfig)), None)
    calibrated = placement is not None or any(isinstance(config, QatConfig) for config in configs)
    pruned = any(isinstance(config, PruneConfig) for config in configs)
    for target in stage.targets:
        if need := unmet_need(target, calibrated=calibrated, placement=placement or "", pruned=pruned):
            problem, hint = need
            yield Problem(path, f"{problem}; the ancestors of stage {name!r} are {describe_ancestors(ancestors)}", hint)
        if stage.embeddings not in (allowed := TARGETS[target].embeddings):
            text = f"target {target} stores word embeddings as {' or '.join(allowed)}, not as {stage.embeddings}"
            yield Problem(("stages", name, "embeddings"), text, f"set it to {allowed[-1]}")


def check_gates(recipe: Recipe, name: str) -> Iterator[Problem]:
    """A gate names a metric of the task, and compares with an earlier stage."""
    task, names = recipe.task, list(recipe.stages)
    metrics, earlier = task.metric_names(), names[: names.index(name)]
    for metric, gate in recipe.stages[name].gates.items():
        path = ("stages", name, "gates", metric)
        if metric not in metrics:
            yield Problem(path, f"no metric {metric!r} of the task {task.name}", suggest(metric, metrics))
        if gate.against is not None and gate.against not in earlier:
            text = f"the gate of stage {name!r} compares with {gate.against!r}, which is no stage before it"
            yield Problem((*path, "against"), text, suggest(gate.against, earlier))
        elif gate.max_drop is not None and gate.against is None and recipe.parent_of(name) is None:
            text = f"stage {name!r} starts from the pretrained model, which has no metrics to compare with"
            yield Problem((*path, "max_drop"), text, "give min instead" + (", or against" if earlier else ""))


def check_schedule(path: tuple[str, ...], stage: PruneConfig) -> Iterator[Problem]:
    """The schedule ends at every pattern and fits the criterion."""
    where, name = ".".join(path), stage.schedule.name
    for pattern in sorted({stage.pattern, *stage.patterns.values()} - {"dense"}):
        if problem := pattern_problem(stage.schedule, pattern):
            yield Problem((*path, "schedule", "num_masks"), f"{where}.schedule: {problem}")
    if not stage.schedule.every_step:
        return
    if stage.criterion.statistics != "none":
        text = f"{where}: schedule {name} chooses masks in every step; criterion {stage.criterion.name} is too slow"
        yield Problem((*path, "criterion"), text, "use the criterion magnitude")
    if stage.ema is not None:
        text = f"{where}: schedule {name} changes masks in every step, and ema averages weights after the last mask"
        yield Problem((*path, "ema"), text, "set ema: null")
    if "recovery_fraction" in stage.model_fields_set:
        text = f"{where}: schedule {name} does not use recovery_fraction"
        yield Problem((*path, "recovery_fraction"), text, "set schedule.until, the share of steps with new masks")


def pattern_problem(schedule: Schedule, pattern: str) -> str:
    """Say why a schedule cannot end at a pattern; empty if it can."""
    try:
        schedule.sparsities(parse_pattern(pattern))
    except ValueError as error:
        return str(error)
    return ""


def check_distillation(recipe: Recipe, name: str, distill: DistillConfig) -> Iterator[Problem]:
    """Check that a weight of the loss is not 0 and that the teacher is a dense ancestor."""
    path, ancestors = ("stages", name, "distill"), recipe.ancestors_of(name)
    dense = [other for other in ancestors if is_dense(recipe, other)]
    if not (distill.minilm_weight or distill.hidden_weight or distill.output_weight or distill.task_weight):
        text = f"every part of the loss of stage {name!r} has weight 0"
        yield Problem(path, text, "set one of minilm_weight, hidden_weight, output_weight, task_weight")
    allowed = TASKS[recipe.task.name].output_losses
    if distill.output_loss is not None and distill.output_loss not in allowed:
        text = f"the task {recipe.task.name} has no output loss {distill.output_loss!r}"
        yield Problem((*path, "output_loss"), text, suggest(distill.output_loss, allowed))
    if distill.teacher is not None and distill.teacher.stage is None:
        yield from check_outside_teacher(recipe, path, distill, distill.teacher)
    elif distill.teacher is not None and (teacher := distill.teacher.stage) not in dense:
        what = "is no dense ancestor of it" if teacher in recipe.stages else "is no stage"
        text = f"the teacher {teacher!r} of stage {name!r} {what}"
        hint = suggest(str(teacher), dense) or "add a train stage before it"
        yield Problem((*path, "teacher"), text, f"{hint}; another model: {{source: NAME}}")
    elif not dense:
        text = f"stage {name!r} distils, but has no train stage among its ancestors {describe_ancestors(ancestors)}"
        yield Problem(path, text, "add a train stage before it to teach, or set distill: null")


def check_outside_teacher(
    recipe: Recipe, path: tuple[str, ...], distill: DistillConfig, teacher: TeacherConfig
) -> Iterator[Problem]:
    """A teacher that is no stage can teach what the stage learns from it."""
    path, task = (*path, "teacher"), TASKS[recipe.task.name]
    if task.reads_captions:
        yield Problem(path, f"the task {recipe.task.name} learns from a stage only", "add a train stage before it")
    if teacher.column is None:
        return
    if "image" in task.columns:
        yield Problem(path, "outputs are stored beside texts, and the task reads images", "give a stage or a source")
    if distill.minilm_weight or distill.hidden_weight or not distill.output_weight:
        text = "stored outputs teach outputs alone"
        yield Problem(path, text, "set minilm_weight: 0, hidden_weight: 0 and output_weight above 0")
    if teacher.file is None and (recipe.data.train.path is None or recipe.data.train.streaming):
        yield Problem(path, "the train split is no single file, which holds the column", "give file")


def is_dense(recipe: Recipe, name: str) -> bool:
    """Tell whether a stage and all its ancestors train the dense model."""
    return all(isinstance(recipe.stages[other], DenseTrainConfig) for other in (name, *recipe.ancestors_of(name)))


def describe_ancestors(ancestors: list[str]) -> str:
    """Describe the ancestors of a stage, the nearest first."""
    return f"({' <- '.join(ancestors)})" if ancestors else "(none)"


def check_results(recipe: Recipe) -> Iterator[Problem]:
    """A row of the results names a stage, and one of its targets where it writes several files."""
    for label, row in recipe.results.items():
        name, slash, target = row.partition("/")
        stage, path = recipe.stages.get(name), ("results", label)
        targets = stage.targets if isinstance(stage, ExportConfig) else ()
        if stage is None:
            yield Problem(path, f"{name!r} is no stage", suggest(name, recipe.stages))
        elif slash and target not in targets:
            hint = suggest(target, targets) if targets else f"write {name}"
            yield Problem(path, f"stage {name!r} has no target {target!r}", hint)
        elif not slash and len(targets) > 1:
            rows = " or ".join(f"{name}/{target}" for target in targets)
            yield Problem(path, f"stage {name!r} writes {len(targets)} files", f"write {rows}")


def check_batch_sizes(recipe: Recipe) -> Iterator[Problem]:
    """A batch holds the rows that belong together."""
    rows = recipe.task.rows_per_group()
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainConfig) and stage.batch_size < rows:
            text = f"a query needs {rows} texts of one batch (query, positive, negatives), and stage {name!r} has "
            hint = f"set it to {rows} or more, or lower task.negatives"
            yield Problem(("stages", name, "batch_size"), f"{text}batches of {stage.batch_size}", hint)


def check_task_inputs(recipe: Recipe) -> Iterator[Problem]:
    """The task uses what the recipe gives of model and data."""
    task, spec, model = recipe.task.name, TASKS[recipe.task.name], recipe.model
    if model.config is not None and not spec.starts_from_config:
        text = f"the task {task} needs pretrained weights and a tokenizer, which model.config does not have"
        yield Problem(("model", "config"), text, "give model.source")
    if model.text_encoder is not None and not spec.reads_captions:
        yield Problem(("model", "text_encoder"), f"the task {task} has no captions", "remove it")
    if recipe.data.augment is not None and not spec.augments:
        yield Problem(("data", "augment"), f"the task {task} does not augment images", "remove it")


def check_streaming(recipe: Recipe) -> Iterator[Problem]:
    """A streamed split is not needed as a whole."""
    for name, split in (("dev", recipe.data.dev), ("test", recipe.data.test)):
        if split is not None and split.streaming:
            text = f"data.{name} is measured as a whole"
            yield Problem(("data", name, "streaming"), text, "only train can be streamed")
    train, path = recipe.data.train, ("data", "train", "streaming")
    if not train.streaming:
        return
    if not TASKS[recipe.task.name].streamable:
        text = f"the task {recipe.task.name} cannot stream its rows, as they do not each stand alone"
        streamable = ", ".join(name for name, spec in TASKS.items() if spec.streamable)
        yield Problem(path, text, f"these tasks can: {streamable}")
    if problem := recipe.task.streaming_problem():
        yield Problem(path, *problem)
    for name, stage in recipe.stages.items():
        if isinstance(stage, CalibrateConfig) and stage.split == "train" and stage.samples > train.buffer:
            text = f"stage {name!r} needs {stage.samples} rows, but the buffer of the streamed train split holds "
            yield Problem(("stages", name, "samples"), f"{text}{train.buffer}", "raise data.train.buffer")


def check_columns(recipe: Recipe) -> Iterator[Problem]:
    """The task reads the columns that the recipe names."""
    columns = TASKS[recipe.task.name].columns
    for key in Columns.model_fields:
        if key in recipe.data.columns.model_fields_set and key not in columns:
            text = f"the task {recipe.task.name} does not read the column {key!r}"
            yield Problem(("data", "columns", key), text, f"its columns are {', '.join(columns)}")
