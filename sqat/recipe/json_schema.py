"""The recipe's JSON schema, and what it allows at a key, in words and as a list of names.

The schema comes from pydantic. Error messages, ``--set``, ``sqat schema`` and the reference page all read it, so they
agree with what is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

from sqat.checkpoint.outputs import MADE_BY
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import STAGE_TYPES
from sqat.recipe.yaml_nodes import Node

SCHEMA_FILE = "recipe.schema.json"  # the first line of a recipe names it for editors
Schema: TypeAlias = dict[str, Any]
KeyPath: TypeAlias = tuple[str | int, ...]


@cache
def recipe_schema() -> Schema:
    """Return the JSON schema of a recipe file: every key with its type, bounds, default and description."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": MADE_BY, **drop_titles(schema)}
    stages = schema["properties"]["stages"]
    (pattern, stage), *_ = stages["patternProperties"].items()
    types = "|".join(STAGE_TYPES)
    stages["patternProperties"] = {pattern.replace("^", f"^(?!({types})$)"): {**stage, "required": ["type"]}}
    stages["properties"] = {
        type_: {"anyOf": [{"$ref": ref}, {"type": "null"}]} for type_, ref in stage["discriminator"]["mapping"].items()
    }
    stages["additionalProperties"] = False
    return schema


def schema_text() -> str:
    """Return the schema as the text of a file, for editors."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def drop_titles(value: Any) -> Any:
    """Drop the titles that pydantic generates; a property called ``title`` would be a mapping and stays."""
    if isinstance(value, list):
        return [drop_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: drop_titles(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))}


def schema_at(path: KeyPath, tree: Node) -> Schema:
    """Return the schema of the value at ``path``; the tree selects the variants of unions."""
    schema, node = recipe_schema(), tree
    for depth, key in enumerate(path):
        chosen = variant(schema, node, path[depth - 1] if depth else None)
        schema = schema_below(chosen, key)
        node = node.child(key) or Node(node.place, None)
    return schema


def variants(schema: Schema) -> Iterator[Schema]:
    """Yield the alternatives of a schema, with references resolved."""
    if "$ref" in schema:
        yield recipe_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    elif "anyOf" in schema or "oneOf" in schema:
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            yield from variants(part)
    else:
        yield schema


def variant(schema: Schema, node: Node, name: str | int | None = None) -> Schema:
    """Return the alternative that fits ``node``: by its discriminator, else by its shape.

    Args:
        name: key of ``node``, which stands for the discriminator of a stage named by its type.
    """
    union = union_of(schema)
    if union is not None:
        key, refs = union["propertyName"], union["mapping"]
        tag = node.child(key) or Node(node.place, node.value)
        default = schema.get("default")
        fallback = default[key] if isinstance(default, dict) else name
        ref = refs.get(tag.value if isinstance(tag.value, str) else fallback)
        if ref is not None:
            return next(variants({"$ref": ref}))
    shape = "object" if isinstance(node.value, dict) else "array" if isinstance(node.value, list) else None
    options = [option for option in variants(schema) if option.get("type") != "null"]
    return next((option for option in options if option.get("type") == shape), options[0] if options else {})


def union_of(schema: Schema) -> Schema | None:
    """Return the discriminator of a schema that is a tagged union, also in its short or optional form."""
    if "discriminator" in schema:
        discriminator: Schema = schema["discriminator"]
        return discriminator
    return next((part["discriminator"] for part in schema.get("anyOf", ()) if "discriminator" in part), None)


def schema_below(schema: Schema, key: str | int) -> Schema:
    """Return the schema of the value under ``key``; empty where there is none."""
    below: Schema = {}
    if isinstance(key, int):
        below = schema.get("items") or next(iter(schema.get("prefixItems", ())), {})
    elif key in schema.get("properties", {}):
        below = schema["properties"][key]
    elif "patternProperties" in schema:
        below = next(iter(schema["patternProperties"].values()))
    elif isinstance(schema.get("additionalProperties"), dict):
        below = schema["additionalProperties"]
    return below


def is_open(schema: Schema) -> bool:
    """Tell whether the user names the keys of the mapping, as for stages and results."""
    return "patternProperties" in schema or isinstance(schema.get("additionalProperties"), dict)


def describe(schema: Schema) -> str:
    """Say what a value must be, to follow the word 'needs'."""
    union = union_of(schema)
    options = list(variants(schema))
    if union is not None:
        phrases = [f"one of {', '.join(union['mapping'])}"]
    elif "short" in schema:
        phrases = [f"a text or a mapping with the key {schema['short']!r}"]
    else:
        phrases = [describe_variant(option) for option in options if option.get("type") != "null"]
    if any(option.get("type") == "null" for option in options):
        phrases.append("null")
    return " or ".join(dict.fromkeys(phrases))


def choices(schema: Schema) -> list[str]:
    """Return the names that a value may take, where these are limited."""
    union = union_of(schema)
    if union is not None:
        return list(union["mapping"])
    return [str(name) for option in variants(schema) for name in (*option.get("enum", ()), *const_of(option))]


def const_of(schema: Schema) -> list[str]:
    """Return the only value that is allowed, in a list; empty where more are."""
    return [schema["const"]] if "const" in schema else []


def describe_variant(schema: Schema) -> str:
    """Say what a value of one variant must be."""
    names = choices(schema)
    if names:
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    json_type = schema.get("type")
    if json_type in ("integer", "number"):
        return f"{'a whole number' if json_type == 'integer' else 'a number'}{describe_bounds(schema)}"
    if json_type == "array":
        least = f" with at least {schema['minItems']} entry" if "minItems" in schema else ""
        plural = {"string": "texts", "number": "numbers", "integer": "whole numbers"}
        if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])} {plural[schema['prefixItems'][0]['type']]}"
        item = schema["items"]
        named = "enum" in item or "const" in item
        return f"a list{least}, each {describe(item)}" if named else f"a list{least} of {plural[item['type']]}"
    if json_type == "string":
        return f"a text of {schema['words']}" if "words" in schema else "a text"
    least = f" with at least {schema['minProperties']} entry" if "minProperties" in schema else ""
    return {"boolean": "true or false", "null": "null"}.get(str(json_type), f"a mapping{least}")


def describe_bounds(schema: Schema) -> str:
    """Say the bounds of a number."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if high < 1e6 else f" from {low:g} to {high}"
    start = f"of at least {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    end = f"at most {high:g}" if high is not None else f"below {below:g}" if below is not None else ""
    return "".join(f" {part}" for part in (start, "and" if start and end else "", end) if part)
