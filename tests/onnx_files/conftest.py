"""A tiny encoder, for every test of this folder."""

from __future__ import annotations

from tests.onnx_models import bert

__all__ = ["bert"]
