"""Which pattern each layer gets, and globs that no layer follows."""

from __future__ import annotations

from typing import Any

import pytest

from sqat.compress.patterns import choose_patterns
from sqat.recipe.stages import Layers
from tests.errors import raises_code
from tests.tiny import MakeModel


def test_a_shared_weight_has_one_pattern(make_model: MakeModel) -> None:
    model: Any = make_model("bert")
    block = model.bert.encoder.layer[0].attention.self
    block.key.weight = block.query.weight
    with raises_code("recipe-conflict"):
        choose_patterns(model, Layers(), "2:4", {"*.0.*.key": "1:4"})
    patterns, skipped = choose_patterns(model, Layers(), "2:4", {"*.0.*.key": "1:4", "*.0.*.query": "1:4"})
    assert sum(str(pattern) == "1:4" for pattern in patterns.values()) == 2
    assert set(skipped) == {"bert.pooler.dense", "classifier"}


BAD_PATTERNS = [
    ({"*.attn.*": "1:4"}, "matches no layer"),
    ({"*": "1:4", "*.query": "2:8"}, r"'\*\.query' comes too late"),
    ({"classifier": "1:4"}, "classifier is skipped: outside the encoder blocks"),
    ({"*": "dense"}, "every layer is dense"),
]


@pytest.mark.parametrize(("patterns", "problem"), BAD_PATTERNS)
def test_globs_that_no_layer_follows_are_refused(make_model: MakeModel, patterns: dict[str, str], problem: str) -> None:
    with raises_code("no-layer", problem):
        choose_patterns(make_model("bert"), Layers(), "2:4", patterns)
