"""The encoder families and a file in order, for every test of this folder."""

from __future__ import annotations

import pytest
from graph_edits import ALL, tied

from sqat.export.qdq import insert_qdq
from tests.onnx_models import Family, bert, family, vit

__all__ = ["bert", "family", "vit", "written"]


@pytest.fixture(scope="module")
def written(bert: Family) -> bytes:
    """A file of the target tensorrt that breaks no rule."""
    return bytes(insert_qdq(bert.graph, tied(bert, *ALL)).SerializeToString())
