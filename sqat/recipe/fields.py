"""Building blocks of the recipe's schema: short forms, unions of parts, checked texts and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic import GetJsonSchemaHandler as JsonHandler
from pydantic_core import CoreSchema, core_schema

from sqat.sparsity.pattern import parse_pattern

STRICT = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def lists_to_tuples(value: Any) -> Any:
    """Turn lists into tuples: after a Python validator, pydantic's strict mode refuses a list."""
    if isinstance(value, dict):
        return {key: lists_to_tuples(item) for key, item in value.items()}
    return tuple(map(lists_to_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Short:
    """Let a bare text stand for ``{key: text}``, in recipes and in their JSON schema.

    ``percentile`` is ``{name: percentile}`` and ``train.jsonl`` is ``{path: train.jsonl}``.
    """

    key: str

    def expand(self, value: Any) -> Any:
        return {self.key: value} if isinstance(value, str) else lists_to_tuples(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: JsonHandler) -> dict[str, Any]:
        full = handler(schema)
        names = list(full.get("discriminator", {}).get("mapping", ()))
        return {"anyOf": [full, {"type": "string", **({"enum": names} if names else {})}], "short": self.key}


@dataclass(frozen=True)
class OneOf:
    """Allow the settings of each part in a table, selected by ``name``; a bare text is ``{name: text}``."""

    parts: tuple[type, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union = reduce(or_, self.parts)
        return handler.generate_schema(Annotated[union, Field(discriminator="name"), Short("name")])


def check_pattern(value: str) -> str:
    """Check ``N:M``."""
    parse_pattern(value)
    return value


def check_pattern_or_dense(value: str) -> str:
    """Check ``N:M`` or ``dense``."""
    if ":" not in value and value != "dense":
        raise ValueError(f"pattern {value!r} is neither N:M, for instance 2:4, nor dense")
    return value if value == "dense" else check_pattern(value)


def check_range(value: tuple[int, int, int]) -> tuple[int, int, int]:
    """Check 1 <= smallest <= usual <= largest."""
    if not 1 <= value[0] <= value[1] <= value[2]:
        got = ", ".join(map(str, value))
        raise ValueError(f"needs three sizes, 1 <= smallest <= usual <= largest, got {got}")
    return value


PatternText = Annotated[str, AfterValidator(check_pattern)]
PatternOrDense = Annotated[str, AfterValidator(check_pattern_or_dense)]
Range = Annotated[tuple[int, int, int], AfterValidator(check_range)]
Sha256 = Annotated[
    str, Field(pattern="^[0-9a-f]{64}$", json_schema_extra={"words": "64 lower-case hexadecimal digits"})
]
StageName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$",
        json_schema_extra={"words": "lower-case letters, digits and -, a letter or digit first"},
    ),
]
