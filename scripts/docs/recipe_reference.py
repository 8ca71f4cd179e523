"""Write recipes/REFERENCE.md, every key a recipe may have, and the schema for editors, from what checks recipes.

    python scripts/docs/recipe_reference.py

Nothing is typed by hand there: the same schema makes the error messages and `sqat schema`. Keys that train, prune and
qat have alike are listed once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sqat import errors
from sqat.recipe.json_schema import SCHEMA_FILE, describe, recipe_schema, schema_text, union_of, variants
from sqat.recipe.stages import STAGE_TYPES

Schema = Mapping[str, Any]
PAGE = Path(__file__).parents[2] / "recipes" / "REFERENCE.md"
HEAD = """\
# Recipe reference

Made by `scripts/docs/recipe_reference.py` from the schema that checks recipes; do not edit. `sqat schema` prints that
schema for editors, which then complete and check recipes as they are typed; `sqat init DATA_FILE` writes a first
recipe. Any key can be set beside the file, too: `--set stages.prune.steps=200`.

A mapping with a `name` may be written as the bare name where its other keys have defaults: `task: relevance`.
"""
FITTED = ("train", "prune", "qat")
TYPE = "type"  # the key that names a stage's type, told once for all


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    (PAGE.parent / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    whole = recipe_schema()
    properties = whole["properties"]
    parts = [HEAD, "## The file", table(properties, whole["required"])]
    for title, key in (("Model", "model"), ("Data", "data"), ("Latency", "latency")):
        parts += [f"## {title}", *mapping(properties[key], 3)]
    parts += ["## Tasks", "The key `name` says which one it is.", *union(properties["task"], 3)]
    parts += ["## Stages", *stages(properties["stages"])]
    parts += ["## Error codes", "A `SqatError` has one of these as `code`.", error_codes()]
    return "\n\n".join(part.strip() for part in without_repeats(parts)) + "\n"


def error_codes() -> str:
    """A table of the codes of `SqatError`, from the comments beside them."""
    source = Path(errors.__file__).read_text(encoding="utf-8")
    rows = re.findall(r'^    "([a-z-]+)",  # (.+)$', source, re.MULTILINE)
    return "\n".join(["| code | meaning |", "| --- | --- |", *(f"| `{code}` | {text} |" for code, text in rows)])


def mapping(schema: Schema, level: int) -> Iterator[str]:
    """The keys of a mapping, and the mappings in it."""
    for option in variants(dict(schema)):
        if "properties" in option:
            yield from keys_of(option["properties"], option.get("required", ()), level)


def keys_of(properties: Schema, required: Sequence[str], level: int) -> Iterator[str]:
    """A table of keys, then a section for each that is itself a mapping of known keys."""
    yield table(properties, required)
    sections: dict[str, list[str]] = {}
    for name, schema in properties.items():
        inner = schema["additionalProperties"] if isinstance(schema.get("additionalProperties"), dict) else schema
        if any("properties" in option for option in variants(inner)):
            parts = union(schema, level + 1) if union_of(schema) else mapping(inner, level + 1)
            sections.setdefault("\n\n".join(parts), []).append(f"`{name}`")
    for text, names in sections.items():
        yield f"{'#' * level} {', '.join(names)}"
        yield text


def union(schema: Schema, level: int) -> Iterator[str]:
    """The variants of a tagged union, each with the keys that are its own."""
    found = union_of(dict(schema))
    assert found is not None
    tags: dict[str, list[str]] = {}
    for tag, reference in found["mapping"].items():
        tags.setdefault(reference, []).append(f"`{tag}`")
    for reference, names in tags.items():
        option = next(variants({"$ref": reference}))
        own = {name: each for name, each in option["properties"].items() if name != found["propertyName"]}
        yield f"**{', '.join(names)}**: {description(option)}"
        if own:
            yield from keys_of(own, option.get("required", ()), level)


def stages(schema: Schema) -> Iterator[str]:
    """What all fitted stages share, and each type's own keys."""
    found = union_of(next(iter(schema["patternProperties"].values())))
    assert found is not None
    types = {type_: next(variants({"$ref": found["mapping"][type_]})) for type_ in STAGE_TYPES}
    shared = {name: each for name, each in types[FITTED[0]]["properties"].items()
              if all(types[type_]["properties"].get(name) == each for type_ in FITTED)}  # fmt: skip
    yield f"{schema['description'].capitalize()}. The types: {', '.join(f'`{type_}`' for type_ in types)}."
    yield f"### Keys of {', '.join(FITTED[:-1])} and {FITTED[-1]}"
    yield from keys_of(shared, (), 4)
    for type_, option in types.items():
        known = {**({} if type_ not in FITTED else shared), TYPE: option["properties"][TYPE]}
        own = {name: each for name, each in option["properties"].items() if known.get(name) != each}
        yield f"### `{type_}`"
        yield description(option)
        yield from keys_of(own, option.get("required", ()), 4)


def without_repeats(parts: Sequence[str]) -> Iterator[str]:
    """The parts, with a section of keys that stood above under the same heading told by that."""
    seen = set()
    for heading, text in zip(["", *parts], parts, strict=False):
        repeated = heading.startswith("###") and (heading, text) in seen
        seen.add((heading, text))
        yield "As above." if repeated else text


def table(properties: Schema, required: Sequence[str]) -> str:
    """Keys with what they may be, their default and what they are for."""
    told = any("description" in schema for schema in properties.values())
    rows = ["| key | value | default |" + " |" * told, "|---|---|---|" + "---|" * told]
    for name, schema in properties.items():
        default = "required" if name in required else show_default(schema.get("default"))
        cells = [f"`{name}`", describe(dict(schema)), default, *[schema.get("description", "")] * told]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def show_default(default: object) -> str:
    """A default as a recipe would have it, without what is empty in it."""
    default = filled(default)
    if default in (None, "", [], {}):
        return ""
    return "`" + yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("\n...\n").strip() + "`"


def filled(default: object) -> object:
    """A default without empty parts; a mapping of which the name is left as that name."""
    if not isinstance(default, dict):
        return default
    parts = {key: filled(each) for key, each in default.items()}
    kept = {key: each for key, each in parts.items() if each not in (None, "", [], {})}
    return kept["name"] if list(kept) == ["name"] else kept


def description(schema: Schema) -> str:
    """What a mapping is, as its class says it."""
    text = str(schema.get("description", "")).replace("``", "`")
    text = re.sub(r"Attributes:\n|^    (\w+): ", lambda found: f"`{found[1]}`: " if found[1] else "", text, flags=re.M)
    return " ".join(text.split())


if __name__ == "__main__":
    main()
