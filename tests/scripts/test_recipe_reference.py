"""recipes/REFERENCE.md is what the schema says today, with every key of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.docs import recipe_reference as reference
from sqat.recipe.json_schema import SCHEMA_FILE, recipe_schema, schema_text

ROOT = Path(__file__).parents[2]


def keys_of(schema: Any) -> Iterator[str]:
    """Every key that any mapping of the schema may have."""
    if isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict):
            yield from properties
        for each in schema.values():
            yield from keys_of(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from keys_of(each)


def test_the_page_is_in_step_with_the_schema() -> None:
    assert (ROOT / "recipes/REFERENCE.md").read_text(encoding="utf-8") == reference.page(), (
        "run python scripts/docs/recipe_reference.py"
    )


def test_recipes_name_the_schema_for_editors() -> None:
    assert (ROOT / "recipes" / SCHEMA_FILE).read_text() == schema_text(), "run python scripts/docs/recipe_reference.py"
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n"), path.name


def test_every_key_is_there() -> None:
    page = reference.page()
    keys = set(keys_of(recipe_schema())) - {"type"}  # which is told in words
    assert {"candidates", "criterion", "damping", "tensorrt", "max_drop"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_defaults_read_as_in_a_recipe() -> None:
    shown = {None: "", 0.0001: "`0.0001`", "adamw": "`adamw`", False: "`false`"}
    assert {default: reference.show_default(default) for default in shown} == shown
    assert (
        reference.show_default({"name": "per-group", "num_masks": 2, "sparsities": None})
        == "`{name: per-group, num_masks: 2}`"
    )
    assert reference.show_default({"name": "magnitude", "extra": []}) == "`magnitude`"
    assert reference.show_default([1, 8, 32]) == "`[1, 8, 32]`"
