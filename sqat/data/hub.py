"""Data sets of the Hugging Face hub: their rows, or the Parquet files that a stream reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

from sqat.data.arrow_files import parquet_schema
from sqat.data.rows import Rows, SplitName
from sqat.data.text_files import Placed
from sqat.data.wording import listed
from sqat.errors import SqatError
from sqat.recipe.inputs import SplitConfig


def hub_rows(split: SplitConfig, name: SplitName, source_name: str) -> Iterator[Placed]:
    """Yield (place, row) for the rows of a hub split, with the names of classes instead of their numbers."""
    rows: Rows = load_from_hub(datasets.load_dataset, split, source_name, {"split": split.split or name})
    placed = ((f"{source_name}:row {number}", row) for number, row in enumerate(rows, 1))
    return with_class_names(placed, class_names(rows.features))


def hub_files(split: SplitConfig, name: SplitName, source_name: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the addresses of a hub split's Parquet files, and its `class_names`; no row is downloaded.

    Raises:
        SqatError: no such split, files of another format, or the hub cannot be reached.
    """
    builder = load_from_hub(datasets.load_dataset_builder, split, source_name, {})
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    chosen = split.split or name
    if chosen not in files:
        raise SqatError(f"the data set has no split {chosen}", f"it has {listed(list(files)) or 'none'}", source_name,
                        code="unknown-name")  # fmt: skip
    other = [address for address in files[chosen] if not address.endswith(".parquet")]
    if other:
        problem = f"only Parquet files of the hub are streamed, and it has {other[0].rpartition('/')[2]}"
        hint = "the hub itself keeps data sets as Parquet: revision: refs/convert/parquet"
        raise SqatError(problem, hint, source_name, code="unreadable-file")
    features = builder.info.features or datasets.Features.from_arrow_schema(
        parquet_schema(files[chosen][0], source_name)
    )
    return list(files[chosen]), class_names(features)


def hub_fingerprint(split: SplitConfig) -> str:
    """Return the hash that the hub library gives a data set."""
    return str(load_from_hub(datasets.load_dataset_builder, split, str(split.hub), {}).hash)


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map each column that holds numbers of classes to the names of the classes."""
    return {key: value.names for key, value in features.items() if isinstance(value, datasets.ClassLabel)}


def with_class_names(source: Iterator[Placed], names: Mapping[str, list[str]]) -> Iterator[Placed]:
    """Replace the numbers of classes by their names."""
    for place, row in source:
        for key, classes in names.items():
            if row.get(key) is not None:
                row[key] = classes[row[key]] if row[key] >= 0 else None  # -1: the label is kept secret
        yield place, row


def load_from_hub(load: Callable[..., Any], split: SplitConfig, source_name: str, part: dict[str, str]) -> Any:
    """Call a loader of `datasets` with the data set that a split names."""
    try:
        return load(split.hub, split.config, revision=split.revision, **part)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"cannot be loaded from the hub: {' '.join(str(error).split())[:300]}"
        hint = "check name, config, split and network, or give a path"
        raise SqatError(problem, hint, source_name, code="missing-file") from error
