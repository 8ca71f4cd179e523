"""A saved checkpoint, and ways to damage it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqat.checkpoint.manifest import manifest_digest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.errors import SqatError

FILES = (
    "config.json",
    "model.safetensors",
    "recipe.yaml",
    "sqat.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return make_checkpoint("bert", metrics={"dev": {"pnr": float("inf"), "accuracy": 1 / 3}}, notes=["ä note"])


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(checkpoint, tmp_path / "01-x")
    return tmp_path / "01-x"


def assert_damaged(directory: Path, place: Path | None = None, code: str = "damaged-checkpoint") -> SqatError:
    """Loading a directory fails with one line that names a place."""
    with pytest.raises(SqatError) as error:
        load_checkpoint(directory)
    assert "\n" not in str(error.value)
    assert error.value.code == code
    assert error.value.hint
    assert place is None or error.value.place == str(place)
    return error.value


def reseal(directory: Path, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest as someone would who knows the format: every digest is right afterwards."""
    manifest = json.loads((directory / "sqat.json").read_text())
    for name in manifest["files"]:
        if (directory / name).is_file():
            manifest["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    edit(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (directory / "sqat.json").write_text(json.dumps(manifest))


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a safetensors file and every digest that covers it."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(path.parent)


def assert_same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
        assert tensor.dtype == others[name].dtype, name
