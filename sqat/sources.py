"""Where pretrained models come from: a folder, a hub name, or a folder inside an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

from safetensors import SafetensorError

from sqat.checkpoint import WEIGHTS
from sqat.errors import SqatError
from sqat.recipe import ModelConfig

LOADING = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what libraries raise at a bad model


def resolve_source(source: str, folder: Path) -> str:
    """Folder or hub name of a model source; ``package:NAME/FOLDER`` is found without importing the package."""
    if source.startswith("package:"):
        return package_folder(source.removeprefix("package:"), source)
    local = folder / source
    if local.is_dir():
        return str(local)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise SqatError(f"model.source is {source!r}, but there is no such folder", f"looked at {local}")
    return source


def package_folder(reference: str, source: str) -> str:
    """Folder inside an installed package."""
    name, _, inner = reference.partition("/")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise SqatError(
            f"model.source is {source!r}, but no package {name!r} is installed",
            f"pip install {name.replace('_', '-')}, or name a folder or a hub model",
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = (root / inner).resolve()
    if not found.is_relative_to(root) or not (found / "config.json").is_file():
        raise SqatError(
            f"model.source is {source!r}, but that folder of the package holds no model", f"looked at {found}"
        )
    return str(found)


def source_digest(config: ModelConfig, folder: Path) -> str:
    """sha256 over the files of local models; a hub model is known by name and revision, which the recipe says."""
    hasher = hashlib.sha256()
    for name in (config.source, config.text_encoder):
        source = Path(resolve_source(name, folder)) if name is not None else None
        if source is None or not source.is_dir():
            continue
        for path in sorted([*source.glob("*"), *source.glob("*/config.json")]):
            if path.suffix in (".json", ".txt", ".model", ".safetensors"):
                hasher.update(f"{path.relative_to(source)} {file_digest(path)}\n".encode())
    return hasher.hexdigest()


def check_digest(config: ModelConfig, source: str) -> None:
    """Compare the sha256 of the weights file with the recipe's, where it gives one."""
    if config.sha256 is None:
        return
    path = Path(source) / WEIGHTS
    if not path.is_file():
        raise SqatError(
            "model.sha256 is given, but the source has no local model.safetensors", "drop it or use a folder"
        )
    digest = file_digest(path)
    if digest != config.sha256:
        raise SqatError(f"model.safetensors has sha256 {digest}, but the recipe says {config.sha256}",
                        "use the version the recipe was made for", str(path))  # fmt: skip


def file_digest(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
