"""What must be true between the parts of a recipe: who may start from whom, which names must exist.

Each rule yields the path of the key it is about, so that the error can point at its line. The schema
alone (`sqat.recipe.schema`) cannot say these things. Left out: files and columns, which only the data know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from sqat.errors import SqatError
from sqat.recipe.inputs import Columns
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import (
    CalibrateConfig,
    DenseTrainConfig,
    DistillConfig,
    ExportConfig,
    PruneConfig,
    QatConfig,
    TrainConfig,
)
from sqat.recipe.targets import TARGETS, unmet_need
from sqat.recipe.tasks import TASKS
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules import Schedule


class Problem(NamedTuple):
    """A broken rule: the key it is about (or would be, if it were given), what is wrong, what to do."""

    path: tuple[str, ...]
    text: str
    hint: str = ""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """The nearest of the allowed names, and all of them."""
    names = list(allowed)
    close = get_close_matches(got.lower(), names, n=1, cutoff=0.6)
    close = close or [name for name in names if len(got) > 3 and got.lower() in name]  # the key of a longer name
    listed = f"allowed: {', '.join(names)}" if names else ""
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Everything wrong between the parts of ``recipe``; broken parents hide what hangs on them."""
    parents = list(_parents(recipe))
    stages = [] if parents else [p for name in recipe.stages for p in _stage(recipe, name)]
    return [
        *parents,
        *stages,
        *_results(recipe),
        *_columns(recipe),
        *_batches(recipe),
        *_pictures(recipe),
        *_streams(recipe),
    ]


def pick_stage(recipe: Recipe, kind: str, name: str | None) -> str:
    """The stage of ``kind`` called ``name``, or the only one there is.

    Raises:
        SqatError: there is none, or several and no name.
    """
    names = [other for other, stage in recipe.stages.items() if stage.type == kind]
    if not names:
        raise SqatError(f"the recipe has no {kind} stage", f"its stages: {', '.join(recipe.stages)}", recipe.name)
    if name is None and len(names) > 1:
        text = f"the recipe has {len(names)} {kind} stages: {', '.join(names)}"
        raise SqatError(text, f"choose one, e.g. --stage {names[0]}", recipe.name)
    if name is not None and name not in names:
        raise SqatError(f"no {kind} stage {name!r}", suggest(name, names), "--stage")
    return name or names[0]


def stage_range(recipe: Recipe, first: str | None, last: str | None) -> list[str]:
    """Names of the stages from ``first`` to ``last``; SqatError for a name that is none, and for none between them."""
    names = list(recipe.stages)
    for flag, name in (("--from", first), ("--to", last)):
        if name is not None and name not in names:
            raise SqatError(f"{flag} {name}: the recipe has no such stage", f"stages: {', '.join(names)}")
    low = names.index(first) if first else 0
    high = names.index(last) + 1 if last else len(names)
    if low >= high:
        raise SqatError(f"--from {first} comes after --to {last}", f"order: {', '.join(names)}")
    return names[low:high]


def _parents(recipe: Recipe) -> Iterator[Problem]:
    before: list[str] = []
    for name, stage in recipe.stages.items():
        path, parent = ("stages", name, "from"), stage.parent
        possible = [other for other in before if not isinstance(recipe.stages[other], ExportConfig)]
        if parent is not None and parent not in before:
            late = "is not a stage before it" if parent in recipe.stages else "is no stage"
            yield Problem(path, f"stage {name!r} starts from {parent!r}, which {late}", suggest(parent, possible))
        elif parent is not None and parent not in possible:
            text = f"stage {name!r} starts from {parent!r}, an export, which holds no model to go on with"
            yield Problem(path, text, suggest(parent, possible))
        before.append(name)


def _stage(recipe: Recipe, name: str) -> Iterator[Problem]:
    stage, line = recipe.stages[name], recipe.ancestors_of(name)
    kinds = {recipe.stages[other].type for other in line}
    path = ("stages", name)
    undone = {"train": {"prune", "calibrate", "qat"}, "prune": {"calibrate", "qat"}}.get(stage.type, set()) & kinds
    if undone:
        first = next(other for other in line if recipe.stages[other].type in undone)
        text = f"stage {name!r} would undo what {first!r} did, {_chain(line)}"
        yield Problem((*path, "from"), text, "the order is train, prune, calibrate, qat, export")
    if isinstance(stage, QatConfig) and "calibrate" not in kinds:
        text = f"stage {name!r} needs a calibrate stage among those it starts from, {_chain(line)}"
        yield Problem((*path, "from"), text, "add a calibrate stage before it")
    if isinstance(stage, ExportConfig):
        yield from _targets(recipe, name, stage, line)
    yield from _gates(recipe, name)
    if isinstance(stage, PruneConfig):
        yield from _schedule(path, stage)
    if isinstance(stage, PruneConfig | QatConfig) and stage.distill is not None:
        yield from _distill(recipe, name, stage.distill, line)


def _targets(recipe: Recipe, name: str, stage: ExportConfig, line: list[str]) -> Iterator[Problem]:
    path, before = ("stages", name, "targets"), [recipe.stages[other] for other in line]
    placement = next((other.placement for other in before if isinstance(other, CalibrateConfig)), None)
    calibrated = placement is not None or any(isinstance(other, QatConfig) for other in before)
    pruned = any(isinstance(other, PruneConfig) for other in before)
    for target in stage.targets:
        if need := unmet_need(target, calibrated=calibrated, placement=placement or "", pruned=pruned):
            problem, hint = need
            yield Problem(path, f"{problem}, and stage {name!r} starts from {_chain(line)}", hint)
        if stage.embeddings not in (allowed := TARGETS[target].embeddings):
            text = f"target {target} stores word embeddings as {' or '.join(allowed)}, not as {stage.embeddings}"
            yield Problem(("stages", name, "embeddings"), text, f"set it to {allowed[-1]}")


def _gates(recipe: Recipe, name: str) -> Iterator[Problem]:
    """Metrics are the task's where more is better, and what a gate compares with has run before."""
    task, before = recipe.task, list(recipe.stages)[: list(recipe.stages).index(name)]
    metrics = task.metric_names()
    for metric, gate in recipe.stages[name].gates.items():
        path = ("stages", name, "gates", metric)
        if metric not in metrics:
            yield Problem(path, f"no metric {metric!r} of the task {task.name}", suggest(metric, metrics))
        if gate.against is not None and gate.against not in before:
            text = f"the gate of stage {name!r} compares with {gate.against!r}, which is no stage before it"
            yield Problem((*path, "against"), text, suggest(gate.against, before))
        elif gate.max_drop is not None and gate.against is None and recipe.parent_of(name) is None:
            text = f"stage {name!r} starts from the pretrained model, which has no figures to compare with"
            yield Problem((*path, "max_drop"), text, "give min instead" + (", or against" if before else ""))


def _schedule(path: tuple[str, ...], stage: PruneConfig) -> Iterator[Problem]:
    where = ".".join(path)
    for pattern in sorted({stage.pattern, *stage.patterns.values()} - {"dense"}):
        if problem := misfit(stage.schedule, pattern):
            yield Problem((*path, "schedule", "num_masks"), f"{where}.schedule: {problem}")
    if not stage.schedule.every_step:
        return
    name = stage.schedule.name
    if stage.criterion.statistics != "none":
        text = f"{where}: schedule {name} chooses masks before every step, so {stage.criterion.name} would observe anew"
        yield Problem((*path, "criterion"), f"{text} each time", f"{name} takes the criterion magnitude")
    if "recovery_fraction" in stage.model_fields_set:
        text = f"{where}: recovery_fraction means nothing to schedule {name}"
        yield Problem((*path, "recovery_fraction"), text, "set schedule.until, the share of steps with new masks")


def misfit(schedule: Schedule, pattern: str) -> str:
    """Why a schedule cannot end at a pattern; empty if it can."""
    try:
        schedule.sparsities(parse_pattern(pattern))
    except ValueError as error:
        return str(error)
    return ""


def _distill(recipe: Recipe, name: str, distill: DistillConfig, line: list[str]) -> Iterator[Problem]:
    dense = [other for other in line if _is_dense(recipe, other)]
    path = ("stages", name, "distill")
    if not (distill.minilm_weight or distill.output_weight or distill.task_weight):
        yield Problem(
            path,
            f"every part of the loss of stage {name!r} has weight 0",
            "give one of minilm_weight, output_weight, task_weight",
        )
    teacher = distill.teacher
    if teacher is not None and teacher not in dense:
        why = "is no stage" if teacher not in recipe.stages else "is not dense and among those it starts from"
        text = f"the teacher {teacher!r} of stage {name!r} {why}"
        yield Problem((*path, "teacher"), text, suggest(teacher, dense) or "add a train stage before it")
    elif not dense:
        text = f"stage {name!r} distils, but none of the stages it starts from, {_chain(line)}, is a train stage"
        yield Problem(path, text, "add a train stage before it to teach, or set distill: null")


def _is_dense(recipe: Recipe, name: str) -> bool:
    return all(isinstance(recipe.stages[other], DenseTrainConfig) for other in (name, *recipe.ancestors_of(name)))


def _chain(line: list[str]) -> str:
    return f"({' <- '.join(line)})" if line else "(none: it starts from the pretrained model)"


def _results(recipe: Recipe) -> Iterator[Problem]:
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
            yield Problem(path, f"stage {name!r} writes {len(targets)} files: say which", f"write {rows}")


def _batches(recipe: Recipe) -> Iterator[Problem]:
    texts = recipe.task.rows_per_group()
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainConfig) and stage.batch_size < texts:
            text = f"a query, its positive and its negatives are {texts} texts, and stage {name!r} has batches of "
            hint = f"set it to {texts} or more, or lower task.negatives"
            yield Problem(("stages", name, "batch_size"), f"{text}{stage.batch_size}", hint)


def _pictures(recipe: Recipe) -> Iterator[Problem]:
    task, spec, model = recipe.task.name, TASKS[recipe.task.name], recipe.model
    if model.config is not None and not spec.starts_from_config:
        text = f"the task {task} starts from pretrained weights and a tokenizer, which model.config has not"
        yield Problem(("model", "config"), text, "give model.source")
    if model.text_encoder is not None and not spec.reads_captions:
        yield Problem(("model", "text_encoder"), f"the task {task} has no captions", "leave it out")
    if recipe.data.augment is not None and not spec.augments:
        yield Problem(("data", "augment"), f"the task {task} does not vary images", "leave it out")


def _streams(recipe: Recipe) -> Iterator[Problem]:
    """What needs all rows at once cannot be had of a split that is streamed."""
    for name, split in (("dev", recipe.data.dev), ("test", recipe.data.test)):
        if split is not None and split.streaming:
            yield Problem(("data", name, "streaming"), f"data.{name} is measured as a whole", "only train is streamed")
    train, path = recipe.data.train, ("data", "train", "streaming")
    if not train.streaming:
        return
    if not TASKS[recipe.task.name].streamable:
        text = f"the rows of the task {recipe.task.name} do not each stand alone as a text"
        yield Problem(path, text, f"streamed are {', '.join(name for name, spec in TASKS.items() if spec.streamable)}")
    if problem := recipe.task.streaming_problem():
        yield Problem(path, *problem)
    for name, stage in recipe.stages.items():
        if isinstance(stage, CalibrateConfig) and stage.split == "train" and stage.samples > train.buffer:
            text = f"stage {name!r} observes {stage.samples} rows, but the buffer of the streamed train split has "
            yield Problem(("stages", name, "samples"), f"{text}{train.buffer}", "raise data.train.buffer")


def _columns(recipe: Recipe) -> Iterator[Problem]:
    columns = TASKS[recipe.task.name].columns
    for key in Columns.model_fields:
        if key in recipe.data.columns.model_fields_set and key not in columns:
            text = f"the column {key!r} means nothing to the task {recipe.task.name}"
            yield Problem(("data", "columns", key), text, f"its columns are {', '.join(columns)}")
