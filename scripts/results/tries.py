"""The log of tries: `recipes/tried.jsonl`, one `schema.Try` a line, measured on dev.

A try holds the difference between the run's recipe and the one it was to improve, for the stage measured and those
before it, model, task and data. Test figures are never logged, since recipes are chosen by the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scripts.results.schema import Try
from sqat.checkpoint.manifest import RECIPE, Manifest, load_manifest
from sqat.errors import SqatError
from sqat.files.replace import replace_file
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import Recipe


def read_tries(path: Path) -> list[Try]:
    """All lines of the log; none where there is no file.

    Raises:
        SqatError: a line is no `Try`.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [parse_try(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def parse_try(line: str, place: str) -> Try:
    """One line of the log."""
    try:
        return Try.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise SqatError(f"{where}: {first['msg']}", place=place, code="unreadable-file") from None


def add_try(entry: Try, path: Path) -> None:
    """Append a line to the log."""
    lines = [*read_tries(path), entry]
    text = "".join(json.dumps(line.model_dump(mode="json"), ensure_ascii=False) + "\n" for line in lines)
    replace_file(path, text.encode())


def try_of(run: Path, recipe: Path, verdict: str, stage: str | None = None) -> Try:
    """What a finished run tried.

    Args:
        run: its folder.
        recipe: the file it was to better.
        stage: whose dev figures count; default: the last that has some.

    Raises:
        SqatError: no such stage, or it was not measured on dev.
    """
    manifests = {found.stage: found for found in map(load_manifest, stage_folders(run))}
    with_dev = [name for name, manifest in manifests.items() if manifest.metrics.get("dev")]
    name = stage or (with_dev[-1] if with_dev else "")
    if name not in with_dev:
        raise SqatError(
            f"no stage {name!r} with figures on dev",
            f"stages: {', '.join(with_dev) or 'none'}",
            str(run),
            code="unknown-name",
        )
    manifest = manifests[name]
    folder = next(path for path in stage_folders(run) if path.name[3:] == name)
    tried = load_recipe(folder / RECIPE, manifest.overrides).recipe
    path = ancestry(tried, name)
    return Try(
        recipe=recipe.stem,
        changed=changes(load_recipe(recipe).recipe, tried, path),
        seed=manifest.seed,
        stage=name,
        figures=manifest.metrics["dev"],
        seconds=round(seconds(manifests, path), 1),
        verdict=verdict,
    )


def stage_folders(run: Path) -> list[Path]:
    """Folders of a run's stages, in order."""
    found = sorted(path for path in run.glob("[0-9][0-9]-*") if path.is_dir())
    if not found:
        raise SqatError(
            "no finished stage is in the folder",
            "give a run's folder, such as runs/NAME",
            str(run),
            code="not-a-checkpoint",
        )
    return found


def seconds(manifests: Mapping[str, Manifest], path: list[str]) -> float:
    """What the stages of a path took."""
    return sum(manifests[stage].seconds for stage in path if stage in manifests)


def ancestry(recipe: Recipe, name: str) -> list[str]:
    """A stage and all that it is made from, in the order of the recipe."""
    before = {recipe.parent_of(name), recipe.teacher_of(name)} - {None}
    path = {name}.union(*(ancestry(recipe, str(stage)) for stage in before))
    return [stage for stage in recipe.stages if stage in path]


def changes(before: Recipe, after: Recipe, path: list[str]) -> dict[str, object]:
    """Dotted key -> its value in ``after``, where that differs; null for a key that is gone.

    A stage that ``before`` does not have is told by what is not a default in it.
    """
    old, new = (dict(flatten(relevant_keys(recipe, path, before))) for recipe in (before, after))
    return {key: new.get(key) for key in {**new, **old} if old.get(key) != new.get(key)}


def relevant_keys(recipe: Recipe, path: list[str], before: Recipe) -> dict[str, Any]:
    """What of a recipe the stages of a path depend on; files are told by their names."""
    whole = recipe.model_dump(mode="json", include={"model", "task", "data"})
    for split in whole["data"].values():
        if isinstance(split, dict) and split.get("path"):
            split["path"] = Path(split["path"]).name
    stages = {name: stage for name, stage in recipe.stages.items() if name in path}
    whole["stages"] = {
        name: {
            **stage.model_dump(mode="json", exclude={"save_every"}, exclude_defaults=name not in before.stages),
            "type": stage.type,
        }
        for name, stage in stages.items()
    }
    return whole


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested mappings with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
