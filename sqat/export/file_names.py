"""What each target's file is called."""

from __future__ import annotations


def file_name(target: str) -> str:
    """``onnx-int8`` -> ``model.int8.onnx``; the two targets that are no graph have a folder of their own."""
    folders = {"torch-semi-structured": "semi-structured", "compressed-tensors": "compressed-tensors"}
    return folders.get(target, f"model.{target.removeprefix('onnx-')}.onnx")
