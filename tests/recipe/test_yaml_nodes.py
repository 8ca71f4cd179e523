"""YAML as a tree with lines: what is refused, and which scalars mean what."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.recipe.stages import QatConfig
from sqat.recipe.yaml_nodes import Place, compose, resolve_scalar
from tests.recipe.valid_recipe import GOOD, error_of, load

# a text, and the line of its error
BAD_TEXTS = [
    ("", 1),
    ("# only a comment\n", 1),
    ("- a\n", 1),
    ("just text\n", 1),
    ("a: 1\nb: 2\na: 3\n", 3),
    ("a: 1\n---\nb: 1\n", 2),
    ("a:\n\tb: 1\n", 2),
    ("a: b: c\n", 1),
    ("a: [1, 2\n", 2),
    ("a: {b: 1\n", 2),
    ("a: 'x\n", 2),
    ("a: 1\nb\n", 3),
    ("a: @x\n", 1),
    ("a:\n  - 1\n b: 2\n", 3),
    ("a: !!python/name:os.system 1\n", 1),
    ("a: *b\n", 1),
    ("a: &x [*x]\n", 1),
    ("[1]: a\n", 1),
    ("'': a\n", 1),
    ("a: 1\nb: \x07\n", 2),
    ('a: "\\ud800"\n', 1),
    ("a: " + "[" * 50 + "]" * 50, 1),
    ("a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
     "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n", 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), BAD_TEXTS)
def test_what_is_no_plain_yaml_mapping_is_refused_at_its_line(tmp_path: Path, text: str, line: int) -> None:
    error = error_of(tmp_path, text)
    assert (error.place, error.code) == (f"r.yaml:{line}", "invalid-recipe")
    assert "\n" not in str(error)


def test_anchors_and_merge_keys_are_followed(tmp_path: Path) -> None:
    text = GOOD.replace("train: {learning_rate: 1e-5}", "train: &fit {learning_rate: 1e-5, epochs: 2}")
    text = text.replace("  qat:\n", "  qat:\n    <<: *fit\n    epochs: 3\n")
    qat = load(tmp_path, text).recipe.stages["qat"]
    assert isinstance(qat, QatConfig)
    assert (qat.learning_rate, qat.epochs) == (1e-5, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2:4", "2:4"), ("1e-5", 1e-5), ("on", "on"), ("no", "no"), ("y", "y"), ("12:30:45", "12:30:45"), ("010", 10),
     ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("2001-01-01", "2001-01-01"), ("~", None), ("True", True),
     ("+.5", 0.5), ("1.", 1.0), (".", "."), ("-", "-"), ("1e5", 1e5), ("=", "="), ("0b1", "0b1")],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = resolve_scalar(text, Place("x"))
    assert got == value
    assert type(got) is type(value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_json_is_read_as_json_reads_it(value: object) -> None:
    assert compose(json.dumps(value), "x").plain() == value


TWICE = [
    ("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n", 5),
    ("a: &a {x: 1}\nc: {<<: *a, z: 1, <<: *a}\n", 2),
    ("a: &a {x: 1}\nc:\n  <<: *a\n  x: 2\n  x: 3\n", 5),
    ("a: &a 1\nb: &a 2\n", 2),
    ("a: &a {b: &a 2}\n", 1),
    ("a: &a {x: 1}\nc: {<<: 3}\n", 2),
    ("a: &a {x: 1}\nc: {<<: [*a, 3]}\n", 2),
    ("a: &a [1]\nc: {<<: *a}\n", 2),
]


@pytest.mark.parametrize(("text", "line"), TWICE)
def test_what_is_given_twice_or_merges_nothing_is_refused(text: str, line: int) -> None:
    with pytest.raises(SqatError) as caught:
        compose(text, "x")
    assert (caught.value.place, caught.value.code) == (f"x:{line}", "invalid-recipe")


def test_merges_of_a_list_follow_yaml() -> None:
    """Keys of its own come first, then the earlier mappings of the list."""
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], x: 3}\nd: {<<: *b, '<<': 4}\ne: {<<: []}\n"
    plain = compose(text, "x").plain()
    assert isinstance(plain, dict)
    assert (plain["c"], plain["d"]) == ({"x": 3, "y": 1, "z": 2}, {"<<": 4, "y": 2, "z": 2})
    assert plain["e"] == {}


SHAPES = {
    "flow list": lambda count: "a: [" + "x, " * count + "]",
    "flow mapping": lambda count: "{" + ", ".join(f"k{number}: 1" for number in range(count)) + "}",
    "block list": lambda count: "a:\n" + "- x\n" * count,
    "empty lists": lambda count: "[" + "[]," * count + "]",
    "merges": lambda count: (
        "k0: &a0 {x0: 1}\n" + "".join(f"k{at}: &a{at} {{<<: *a{at - 1}, x{at}: 1}}\n" for at in range(1, count // 100))
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_of_too_many_values_is_told_at_once(shape: str) -> None:
    start = time.process_time()
    with pytest.raises(SqatError, match="more than 10000 values"):
        compose(SHAPES[shape](250_000), "x")
    assert time.process_time() - start < 3
