"""sqat.Embed and sqat.EmbedInt8 against NumPy, and numbers that are out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests.runtime.nodes import Node, available, needs_library, quantize

pytestmark = needs_library
SETS = available()
EPSILON = 1e-5


def inputs(int8: bool, types: bool, places: bool, width: int = 40) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(width)
    fed: dict[str, Any] = {"ids": rng.integers(0, 50, (3, 20)), "types": None, "places": None}
    tables: dict[str, NDArray[Any]] = {"word": rng.normal(size=(50, width)).astype(np.float32)}
    if int8:
        tables["word"] = rng.integers(-127, 128, (50, width)).astype(np.int8)
        tables["word_scale"] = rng.random(50).astype(np.float32) / 50
    tables["position"] = rng.normal(size=(24, width)).astype(np.float32)
    if types:
        fed["types"] = rng.integers(0, 2, (3, 20))
        tables["type"] = rng.normal(size=(2, width)).astype(np.float32)
    if places:
        fed["places"] = rng.integers(0, 24, (3, 20))
    tables |= {"gamma": rng.normal(size=width).astype(np.float32), "beta": rng.normal(size=width).astype(np.float32)}
    return fed, tables


def node(fed: dict[str, Any], tables: dict[str, Any], outputs: str = "YQ") -> Node:
    int8 = tables["word"].dtype == np.int8
    words = ("word", "word_scale") if int8 else ("word",)
    order = ("ids", "types", "places", *words, "position", "type", "gamma", "beta")
    kinds = {"Y" if "Y" in outputs else "": TensorProto.FLOAT} | ({"Q": TensorProto.UINT8} if "Q" in outputs else {})
    attributes = {"y_scale": 0.03, "epsilon": EPSILON}
    return Node("EmbedInt8" if int8 else "Embed", fed, tables, order, kinds, attributes)


def expected(fed: dict[str, Any], tables: dict[str, Any]) -> NDArray[np.float64]:
    words = tables["word"].astype(np.float64)
    if "word_scale" in tables:
        words *= tables["word_scale"][:, None]
    tokens = fed["ids"].shape[1]
    x = words[fed["ids"]] + tables["position"][np.arange(tokens) if fed["places"] is None else fed["places"]]
    if "type" in tables:
        x = x + tables["type"][0 if fed["types"] is None else fed["types"]]
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return np.asarray(normal * tables["gamma"] + tables["beta"])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize(("int8", "width"), [(False, 40), (True, 40), (True, 64), (False, 7)])
def test_sum_and_layer_norm(int8: bool, width: int, types: bool, places: bool, isa: str) -> None:
    fed, tables = inputs(int8, types, places, width)
    y, q = node(fed, tables).run(isa, threads=2)
    np.testing.assert_allclose(y, expected(fed, tables), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(q, quantize(y, 0.03))
    for got, want in zip((y, q), node(fed, tables).run("scalar"), strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def test_missing_token_types_are_0() -> None:
    fed, tables = inputs(int8=False, types=True, places=False)
    fed["types"] = None
    np.testing.assert_allclose(node(fed, tables, "Y").run()[0], expected(fed, tables), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", ["Y", "Q"])
def test_either_output_alone(outputs: str) -> None:
    fed, tables = inputs(int8=True, types=True, places=True)
    both = dict(zip("YQ", node(fed, tables).run(), strict=True))
    np.testing.assert_array_equal(node(fed, tables, outputs).run()[0], both[outputs])


@pytest.mark.parametrize("number", [-1, 10**12, "rows"])
@pytest.mark.parametrize("name", ["ids", "types", "places"])
def test_numbers_out_of_range(name: str, number: int | str) -> None:
    fed, tables = inputs(int8=False, types=True, places=True)
    rows = {"ids": 50, "types": 2, "places": 24}[name]
    fed[name][1, 2] = rows if isinstance(number, str) else number
    with pytest.raises(Exception, match=f"sqat.Embed: {name} has {fed[name][1, 2]}, expected 0 to {rows - 1}"):
        node(fed, tables).run()


def test_more_tokens_than_positions() -> None:
    fed, tables = inputs(int8=False, types=False, places=False)
    tables["position"] = tables["position"][:8]
    with pytest.raises(Exception, match="has 20 tokens, but there are only 8 positions"):
        node(fed, tables).run()
