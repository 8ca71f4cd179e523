"""The encoder families, for every test of this folder."""

from __future__ import annotations

from tests.onnx_models import bert, family, vit

__all__ = ["bert", "family", "vit"]
