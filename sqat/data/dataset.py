"""Data: files or a hub data set -> checked rows -> tokens -> batches.

Whatever the source looks like, every split becomes a `datasets.Dataset` with the columns ``text``,
``text_pair`` (where there are two), ``label``, ``group`` (relevance: the number of the query; rows of a
query are neighbours) and ``place`` (``file:line``, for later complaints). It lives in Arrow memory, about as
large as the text itself, and is never cached on disk: what a run sees is what the file holds now. Plans of
batches are pure functions of (lengths, units, batch size, seed, epoch), so every process and every resumed
run finds the same ones. Left out: streaming of data sets larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.table import InMemoryTable
from torch import Tensor

from sqat.data.arrow_files import parquet_schema
from sqat.data.image_files import image_file
from sqat.data.records import QUERY, Record, records_of
from sqat.data.shards import shard_paths
from sqat.data.text_files import Placed, listed, read_rows
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import ClassificationTask, RelevanceTask, RetrievalTask, TaskSettings

Rows: TypeAlias = datasets.Dataset
SplitName = Literal["train", "dev", "test"]

CHUNK = 4096  # rows turned into Arrow, or tokenized, at a time
WINDOW = 50  # batches that are sorted by length together
NO_CACHE = "sqat"  # the name of nothing: without one, datasets would hash all rows for its cache on disk


def load_rows(split: SplitConfig, name: SplitName, columns: Columns, task: TaskSettings, folder: Path) -> Rows:
    """Read and check one split.

    Args:
        name: which split it is; a train split must hold something to learn, the others something to measure.
        folder: what a relative path starts from (the recipe's folder).

    Returns:
        Rows with text, text_pair, label, group and place as the module says. Labels of classification are
        texts (a whole number becomes its digits), all others are floats.

    Raises:
        SqatError: at the first bad row, with its place.
    """
    shown = split.path or f"{split.hub}[{split.split or name}]"
    path = None if split.path is None else folder / split.path
    source = _hub_rows(split, name, shown) if path is None else read_rows(path, shown)
    rows = rows_of(records_of(source, columns, task, split.limit, None if path is None else path.parent))
    if len(rows) == 0:
        raise SqatError("no rows", "the split must hold at least one", shown)
    _check_labels(rows, name, task, shown)
    return rows


def rows_of(records: Iterator[Record]) -> Rows:
    """Checked records as rows in Arrow memory."""
    return Rows(InMemoryTable(_to_table(records)), fingerprint=NO_CACHE)


def some_rows(rows: Rows, indices: list[int]) -> Rows:
    """Rows of their own, as ``select`` gives, at a third of its time; rows that lie in Arrow memory as they are."""
    return Rows(InMemoryTable(rows.data.table.take(indices)), fingerprint=NO_CACHE)


def _to_table(records: Iterator[Record]) -> pa.Table:
    """Collect records chunk by chunk; the rows of a group are brought together, first seen first."""
    batches: list[pa.RecordBatch] = []
    while chunk := list(islice(records, CHUNK)):
        batches.append(pa.RecordBatch.from_pylist(chunk))
    table = pa.Table.from_batches(batches) if batches else pa.table({})
    if "group" not in table.column_names:
        return table
    groups = table["group"].to_numpy()
    return table if bool((groups[1:] >= groups[:-1]).all()) else table.take(np.argsort(groups, kind="stable"))


def _check_labels(rows: Rows, name: SplitName, task: TaskSettings, shown: str) -> None:
    """Refuse a split that nothing can be learned from (train) or measured on (dev, test)."""
    if task.name == "text-to-image":
        return
    if isinstance(task, RelevanceTask):
        _check_grades(rows, name, task, shown)
    elif isinstance(task, RetrievalTask):
        _check_search(rows, name, task, shown)
    elif (name == "train" or task.name == "query-performance") and len(set(rows["label"])) == 1:
        what = "class" if isinstance(task, ClassificationTask) else "score"
        problem = f'all {len(rows)} rows have the same {what} "{rows[0]["label"]}"'
        hint = f"{name} needs at least two; is data.columns.label right, is limit too low?"
        raise SqatError(problem, hint, shown)


def _check_grades(rows: Rows, name: SplitName, task: RelevanceTask, shown: str) -> None:
    _check_repeats(rows, "text_pair")
    labels, groups = column(rows, "label"), column(rows, "group")
    lowest, highest = grade_range(labels, groups)
    if len(labels) > 1 and labels.min() == labels.max():
        problem = f"all {len(labels)} passages of {len(lowest)} queries have the grade {labels[0]:g}"
        raise SqatError(problem, "there must be two grades; is data.columns.label right, is limit too low?", shown)
    if name != "train" and highest.max() < task.relevant_from:
        problem = f"no passage of {len(lowest)} queries has a grade of at least {task.relevant_from:g}"
        raise SqatError(problem, f"the highest is {highest.max():g}: lower task.relevant_from", shown)
    if name != "train":
        usable = bool(((lowest < task.relevant_from) & (highest >= task.relevant_from)).any())
        need = f"a grade of at least {task.relevant_from:g} (task.relevant_from) and one below it"
    elif task.loss == "pairwise":
        usable, need = bool((lowest < highest).any()), "two different grades (task.loss pairwise)"
    else:
        usable, need = bool(labels.min() < labels.max()), "two different grades"
    if not usable:
        problem = f"none of the {len(lowest)} queries has passages of {need}"
        raise SqatError(problem, "are data.columns.group and label right, is limit too low?", shown)


def _check_search(rows: Rows, name: SplitName, task: RetrievalTask, shown: str) -> None:
    """Refuse a split without a query that has a positive; train may hold texts alone, for distillation."""
    _check_repeats(rows, "text")
    labels = column(rows, "label")
    queries, highest = int((labels == QUERY).sum()), float(labels.max())
    if queries == 0 and name != "train":
        raise SqatError("no row has a query", "is data.columns.query right?", shown)
    reranks = task.metric in ("rerank-ndcg@10", "pnr")
    if name != "train" and reranks and not (queries and (labels[labels >= 0] < task.relevant_from).any()):
        problem = f"task.metric {task.metric} compares a query's own passages, and all of them are relevant"
        raise SqatError(problem, "add passages of grade 0, or take another metric", shown)
    if queries and highest < task.relevant_from:
        problem = f"none of {queries} queries has a passage of grade {task.relevant_from:g} or more"
        hint = f"the highest grade is {highest:g}: " if highest >= 0 else ""
        raise SqatError(problem, f"{hint}is task.relevant_from or limit right?", shown)


def _check_repeats(rows: Rows, passage: str) -> None:
    """Refuse a passage that a query has twice with different grades; twice with the same one does no harm."""
    keys = ["group", passage]
    table = rows.data.table.filter(pc.greater_equal(rows.data.table["label"], 0))
    found = table.group_by(keys).aggregate([("label", "min"), ("label", "max"), ("place", "list")])
    clashes = found.filter(pc.less(found["label_min"], found["label_max"]))
    if clashes.num_rows:
        clash = clashes.slice(0, 1).to_pylist()[0]
        first, *_, last = clash["place_list"]
        grades = f"the grades {clash['label_min']:g} and {clash['label_max']:g}"
        problem = f'a query has the passage "{clash[passage][:40]}" with {grades} (first at {first})'
        raise SqatError(problem, "keep the row that is right", last)


def grade_range(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest label [Q] of each query; the rows [N] of a query must be neighbours."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.minimum.reduceat(labels, starts), np.maximum.reduceat(labels, starts)


def column(rows: Rows, name: str) -> np.ndarray:
    """A numeric column as an array [N], in row order."""
    values: np.ndarray = rows.with_format("numpy", columns=[name])[:][name]
    return values


def _hub_rows(split: SplitConfig, name: SplitName, shown: str) -> Iterator[Placed]:
    """Rows of a hub data set; class numbers become the class names the data set gives them."""
    found: Rows = _from_hub(datasets.load_dataset, split, shown, {"split": split.split or name})
    placed = ((f"{shown}:row {number}", row) for number, row in enumerate(found, 1))
    return with_class_names(placed, class_names(found.features))


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column -> names of its classes, for the columns of a hub data set that hold numbers of classes."""
    return {key: value.names for key, value in features.items() if isinstance(value, datasets.ClassLabel)}


def with_class_names(source: Iterator[Placed], named: Mapping[str, list[str]]) -> Iterator[Placed]:
    """Rows with the names of classes instead of their numbers."""
    for place, row in source:
        for key, names in named.items():
            if row.get(key) is not None:
                row[key] = names[row[key]] if row[key] >= 0 else None  # -1: the label is kept secret
        yield place, row


def hub_files(split: SplitConfig, name: SplitName, shown: str) -> tuple[list[str], dict[str, list[str]]]:
    """Addresses of the Parquet files that a hub split consists of, and its `class_names`; no rows are fetched.

    Raises:
        SqatError: no such split, files of another format, or the hub cannot be reached.
    """
    builder = _from_hub(datasets.load_dataset_builder, split, shown, {})
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    wanted = split.split or name
    if wanted not in files:
        raise SqatError(f"the data set has no split {wanted}", f"it has {listed(list(files)) or 'none'}", shown)
    other = [address for address in files[wanted] if not address.endswith(".parquet")]
    if other:
        problem = f"only Parquet files of the hub are streamed, and it has {other[0].rpartition('/')[2]}"
        raise SqatError(problem, "the hub itself keeps data sets as Parquet: revision: refs/convert/parquet", shown)
    features = builder.info.features or datasets.Features.from_arrow_schema(parquet_schema(files[wanted][0], shown))
    return list(files[wanted]), class_names(features)


def _from_hub(load: Callable[..., Any], split: SplitConfig, shown: str, part: dict[str, str]) -> Any:
    try:
        return load(split.hub, split.config, revision=split.revision, **part)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"cannot be loaded from the hub: {' '.join(str(error).split())[:300]}"
        raise SqatError(problem, "check name, config, split and network, or give a path", shown) from error


def digest(split: SplitConfig, folder: Path, images: str | None = None) -> str:
    """Sha256 over what a split holds: the file's bytes (or the hub's fingerprint of it) and the limit.

    Args:
        images: the column that names image files, whose bytes count too.

    Raises:
        SqatError: the file is not there, or the hub cannot be reached.
    """
    facts = {"limit": split.limit, **({"streaming": split.buffer} if split.streaming else {})}
    state = hashlib.sha256(json.dumps(facts).encode())
    if split.path is None:
        builder = _from_hub(datasets.load_dataset_builder, split, str(split.hub), {})
        names = [split.hub, split.config, split.split, split.revision, builder.hash]
        state.update(json.dumps(names).encode())
        return state.hexdigest()
    try:
        for path in shard_paths(split.path, folder) if split.streaming else [folder / split.path]:
            state.update(f"shard of {path.stat().st_size}".encode() if split.streaming else b"")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    state.update(block)
    except OSError as error:
        hint = "paths are relative to the recipe"
        raise SqatError(f"cannot be read: {error.strerror}", hint, split.path) from None
    if images is not None and not split.path.lower().endswith(".npz"):
        for place, row in read_rows(folder / split.path, split.path):
            if isinstance(name := row.get(images), str):
                with suppress(OSError, SqatError):  # what is no image here is told where the row is read
                    state.update(image_file(name, (folder / split.path).parent, place).read_bytes())
    return state.hexdigest()


def tokenize(rows: Rows, tokenizer: Any, max_length: int) -> Rows:
    """Add ``input_ids``, ``token_type_ids`` (if the tokenizer gives them) and ``length``, unpadded.

    What is too long is cut ``longest_first``: tokens come off whichever text is longer at the moment. With a
    short query that is the same as ``only_second``; with a long one the passage keeps half of the room.

    Raises:
        SqatError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise SqatError("the tokenizer has no padding token", "batches of several texts need one")
    fields = [name for name in ("text", "text_pair") if name in rows.column_names]
    parts: dict[str, list[pa.Array]] = {}
    table = rows.with_format("arrow")[:]
    for start in range(0, len(rows), CHUNK):
        texts = [table[name].slice(start, CHUNK).to_pylist() for name in fields]
        tokens = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        for name in ("input_ids", "token_type_ids"):
            if name in tokens:
                parts.setdefault(name, []).append(pa.array(tokens[name], pa.list_(pa.int32())))
        parts.setdefault("length", []).append(pa.array([len(ids) for ids in tokens["input_ids"]], pa.int32()))
    for name, arrays in parts.items():
        table = table.append_column(name, pa.chunked_array(arrays))
    return Rows(InMemoryTable(table), fingerprint=NO_CACHE)


class Processor(Protocol):
    """Turns checked rows into what a model reads; its files lie beside the model in a checkpoint."""

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        """Add the columns that `collate` reads, and ``length``, by which rows of like size share a batch."""

    def collate(self, rows: Rows, indices: list[int]) -> Batch:
        """One batch of prepared, encoded rows."""

    def save(self, folder: Path) -> None:
        """Write what rebuilds the processor."""


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer: one or two texts a row."""

    tokenizer: Any

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        return tokenize(rows, self.tokenizer, max_length)

    def collate(self, rows: Rows, indices: list[int]) -> Batch:
        return collate(rows, indices, self.tokenizer)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Batch:
    """What one forward pass and its loss need.

    Attributes:
        inputs: of the model by name; of texts input_ids, attention_mask (and token_type_ids), int64 [B, T].
        labels: [B], int64 for classes, float32 otherwise; [B, ...] where a model puts out more than scores.
        groups: int64 [B], number of the query; -1 where there is none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labels, groups = (value.to(device, non_blocking=True) for value in (self.labels, self.groups))
        return replace(self, inputs=inputs, labels=labels, groups=groups)


def collate(rows: Rows, indices: list[int], tokenizer: Any) -> Batch:
    """Pad tokenized, encoded rows to the longest of them, on the tokenizer's side.

    Same result as ``tokenizer.pad`` (the tests compare them) at a tenth of its time.
    """
    picked: Mapping[str, list[Any]] = rows[indices]
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    left = tokenizer.padding_side == "left"
    inputs = {name: _padded(picked[name], pad, left) for name, pad in pads.items() if name in picked}
    inputs["attention_mask"] = _padded([[1] * length for length in picked["length"]], 0, left)
    whole = isinstance(picked["label"][0], int)
    return Batch(
        inputs,
        torch.tensor(picked["label"], dtype=torch.int64 if whole else torch.float32),
        torch.tensor(picked.get("group", [-1] * len(indices)), dtype=torch.int64),
    )


def _padded(values: list[list[int]], pad: int, left: bool) -> Tensor:
    longest = max(map(len, values))
    padded = [
        [pad] * (longest - len(value)) + value if left else value + [pad] * (longest - len(value)) for value in values
    ]
    return torch.tensor(padded, dtype=torch.int64)


def plan_batches(
    lengths: list[int], units: list[list[int]], batch_size: int, seed: int, epoch: int, part: int = 0
) -> list[list[int]]:
    """Batches of one epoch: random, yet of rows of like length.

    Units are shuffled by (seed, epoch), sorted by length within windows of 50 batches, packed whole into
    batches of at most ``batch_size`` rows, and the batches shuffled.

    Args:
        lengths: tokens of every row.
        units: rows that must share a batch.
        part: of an epoch that is planned in parts, each shuffled in its own way.

    Raises:
        SqatError: a unit has more rows than a batch.
    """
    largest = max(map(len, units), default=0)
    if largest > batch_size:
        problem = f"a query has {largest} passages, which must share a batch, but batch_size is {batch_size}"
        hint = f"set task.candidates to {batch_size} or less, or batch_size to {largest} or more"
        raise SqatError(problem, hint)
    random = np.random.default_rng((seed, epoch, 0, part))  # zeros at the end change nothing: as (seed, epoch)
    shuffled = [units[i] for i in random.permutation(len(units))]
    windows = _pack(shuffled, WINDOW * batch_size)
    by_length = (sorted(window, key=lambda unit: max(lengths[i] for i in unit)) for window in windows)
    batches = [list(chain(*batch)) for window in by_length for batch in _pack(window, batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _pack(units: list[list[int]], size: int) -> list[list[list[int]]]:
    """Cut a list of units into runs of at most ``size`` rows, each as long as it can be."""
    packs: list[list[list[int]]] = []
    room = 0
    for unit in units:
        if len(unit) > room:
            packs.append([])
            room = size
        packs[-1].append(unit)
        room -= len(unit)
    return packs


def ordered_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: every row once, sorted by length, shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
