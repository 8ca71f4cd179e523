"""Choose stages of a recipe by the names that a command line gives."""

from __future__ import annotations

from sqat.errors import SqatError, suggest
from sqat.recipe.schema import Recipe


def pick_stage(recipe: Recipe, stage_type: str, name: str | None) -> str:
    """Return the stage of a type called ``name``, or the only one.

    Raises:
        SqatError: there is none, or several and no name.
    """
    names = [other for other, stage in recipe.stages.items() if stage.type == stage_type]
    if not names:
        hint = f"its stages: {', '.join(recipe.stages)}"
        raise SqatError(f"the recipe has no {stage_type} stage", hint, recipe.name, code="unknown-name")
    if name is None and len(names) > 1:
        problem = f"the recipe has {len(names)} {stage_type} stages: {', '.join(names)}"
        raise SqatError(problem, f"choose one, e.g. --stage {names[0]}", recipe.name, code="usage")
    if name is not None and name not in names:
        raise SqatError(f"no {stage_type} stage {name!r}", suggest(name, names), "--stage", code="unknown-name")
    return name or names[0]


def stage_range(recipe: Recipe, first: str | None, last: str | None) -> list[str]:
    """Return the names of the stages from ``first`` to ``last``.

    Raises:
        SqatError: a name is unknown, or ``first`` comes after ``last``.
    """
    names = list(recipe.stages)
    for flag, name in (("--from", first), ("--to", last)):
        if name is not None and name not in names:
            problem = f"{flag} {name}: the recipe has no such stage"
            raise SqatError(problem, f"stages: {', '.join(names)}", code="unknown-name")
    start = names.index(first) if first else 0
    stop = names.index(last) + 1 if last else len(names)
    if start >= stop:
        raise SqatError(f"--from {first} comes after --to {last}", f"order: {', '.join(names)}", code="usage")
    return names[start:stop]
