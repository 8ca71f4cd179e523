"""Where a split's rows come from, a file or the hub, and a digest of what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sqat.data.hub import hub_fingerprint, hub_rows
from sqat.data.image_files import image_file
from sqat.data.rows import SplitName
from sqat.data.shards import shard_paths
from sqat.data.text_files import Placed, describe_delimiter, read_rows
from sqat.errors import SqatError
from sqat.files.read import open_file, read_bytes
from sqat.recipe.inputs import SplitConfig


def split_place(split: SplitConfig, name: SplitName) -> str:
    """Return what a split is called in errors."""
    return split.path or f"{split.hub}[{split.split or name}]"


def read_split(split: SplitConfig, name: SplitName, folder: Path) -> tuple[Iterator[Placed], Path | None]:
    """Return (place, row) for the rows of a split, and the folder whose image files the rows may name.

    Args:
        folder: that relative paths start from, the recipe's.
    """
    place = split_place(split, name)
    if split.path is None:
        return hub_rows(split, name, place), None
    path = folder / split.path
    return read_rows(path, place), path.parent


def describe_split(split: SplitConfig, name: SplitName, folder: Path) -> list[str]:
    """Return a remark for each file of a split whose separator was found, not given."""
    if split.path is None:
        return []
    paths = shard_paths(split.path, folder) if split.streaming else [folder / split.path]
    places = [path.relative_to(folder).as_posix() if split.streaming else split_place(split, name) for path in paths]
    remarks = [describe_delimiter(path, place) for path, place in zip(paths, places, strict=True)]
    return [remark for remark in remarks if remark]


def split_digest(split: SplitConfig, folder: Path, images: str | None = None) -> str:
    """Return the sha256 of a split: the file's bytes, or the hub's fingerprint of it, and the limit.

    Args:
        images: the column that names image files, whose bytes count too.

    Raises:
        SqatError: the file does not exist, or the hub cannot be reached.
    """
    facts = {"limit": split.limit, **({"streaming": split.buffer} if split.streaming else {})}
    state = hashlib.sha256(json.dumps(facts).encode())
    if split.path is None:
        names = [split.hub, split.config, split.split, split.revision, hub_fingerprint(split)]
        state.update(json.dumps(names).encode())
        return state.hexdigest()
    try:
        for path in shard_paths(split.path, folder) if split.streaming else [folder / split.path]:
            state.update(f"shard of {path.stat().st_size}".encode() if split.streaming else b"")
            with open_file(path, place=split.path) as file:
                while block := file.read(1 << 20):
                    state.update(block)
    except OSError as error:
        raise SqatError(f"cannot be read: {error.strerror}", "paths are relative to the recipe", split.path,
                        code="unreadable-file") from None  # fmt: skip
    if images is not None and not split.path.lower().endswith(".npz"):
        for place, row in read_rows(folder / split.path, split.path):
            if isinstance(name := row.get(images), str):
                with suppress(OSError, SqatError):  # reading the row reports what is not an image
                    state.update(read_bytes(image_file(name, (folder / split.path).parent, place)))
    return state.hexdigest()
