"""Where pretrained models come from: a folder, a hub name, or a folder inside an installed package.

A folder may come from a stranger, so what would make transformers read weights elsewhere is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from sqat.checkpoint.manifest import WEIGHTS, file_digest
from sqat.errors import SqatError
from sqat.files.read import open_file, read_json
from sqat.models.source_files import check_regular
from sqat.recipe.inputs import ModelConfig

ADAPTER = "adapter_config.json"
# What libraries raise for a bad model.
LOADING_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, MemoryError, SafetensorError, StrictDataclassError),
)


def resolve_source(source: str, folder: Path, key: str = "model.source") -> str:
    """Return the folder or hub name of a source; ``package:NAME/FOLDER`` is found without importing the package.

    Args:
        folder: that relative sources start from.
        key: of the recipe that names the source.

    Raises:
        SqatError: no such folder or package, or one whose weights lie elsewhere.
    """
    if source.startswith("package:"):
        installed = package_folder(source.removeprefix("package:"), source, key)
        check_own_weights(Path(installed))
        return installed
    local = folder / source
    if local.is_dir():
        check_own_weights(local)
        return str(local)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise SqatError(f"{key} is {source!r}, but there is no such folder", f"looked at {local}", code="missing-file")
    return source


def package_folder(reference: str, source: str, key: str) -> str:
    """Return a folder inside an installed package."""
    name, _, inner = reference.partition("/")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise SqatError(
            f"{key} is {source!r}, but no package {name!r} is installed",
            f"pip install {name.replace('_', '-')}, or name a folder or a hub model",
            code="missing-file",
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not (path / "config.json").is_file():
        raise SqatError(
            f"{key} is {source!r}, but that folder of the package holds no model",
            f"looked at {path}",
            code="missing-file",
        )
    return str(path)


def check_own_weights(folder: Path) -> None:
    """Refuse a folder whose weights lie elsewhere: an adapter, or an index that lists files outside the folder.

    Raises:
        SqatError: it is one of these.
    """
    check_regular(folder)
    if (path := folder / ADAPTER).is_file():
        raise SqatError("is an adapter, whose weights belong to another model", "merge them and save the whole model",
                        str(path), code="unsupported-model")  # fmt: skip
    for path in sorted(folder.glob("*.index.json")):
        try:
            names = list(read_json(path)["weight_map"].values())
        except (KeyError, TypeError, AttributeError):
            raise SqatError(
                "is no index of weights", "get the model again", str(path), code="unreadable-file"
            ) from None
        other = [name for name in names if Path(str(name)).name != name or name in ("", "..")]
        if other:
            raise SqatError(
                f"names weights outside its folder: {other[0]!r}",
                "get the model again",
                str(path),
                code="unreadable-file",
            )


def source_digest(config: ModelConfig, folder: Path, key: str = "model.source") -> str:
    """Return the sha256 over the files of local models; the recipe's name and revision identify a hub model."""
    hasher = hashlib.sha256()
    for name in (config.source, config.text_encoder):
        source = Path(resolve_source(name, folder, key)) if name is not None else None
        if source is None or not source.is_dir():
            continue
        for path in sorted([*source.glob("*"), *source.glob("*/config.json")]):
            if path.suffix in (".json", ".txt", ".model", ".safetensors"):
                open_file(path).close()  # of a folder below, a pipe would block
                hasher.update(f"{path.relative_to(source)} {file_digest(path)}\n".encode())
    return hasher.hexdigest()


def check_digest(config: ModelConfig, source: str) -> None:
    """Refuse a weights file whose sha256 is not the recipe's, where it gives one."""
    if config.sha256 is None:
        return
    path = Path(source) / WEIGHTS
    if not path.is_file():
        raise SqatError(
            "model.sha256 is given, but the source has no local model.safetensors",
            "drop it or use a folder",
            code="model-mismatch",
        )
    digest = file_digest(path)
    if digest != config.sha256:
        raise SqatError(f"model.safetensors has sha256 {digest}, but the recipe says {config.sha256}",
                        "use the version the recipe was made for", str(path), code="model-mismatch")  # fmt: skip


def check_loaded(new: Sequence[str], source: str) -> None:
    """Refuse a model with weights that the source lacks: they would stay random.

    Args:
        new: names of these weights.
    """
    if new:
        problem = f"the weights of {source!r} are not those its config.json describes"
        raise SqatError(f"{problem}: {len(new)} are missing or of another shape, the first is {new[0]}",
                        "check the source that the recipe names", code="model-mismatch")  # fmt: skip


def new_body_weights(prefix: str, report: Mapping[str, Any]) -> list[str]:
    """Return the weights that transformers reports as random, except head and pooler."""
    new = [*sorted(report["missing_keys"]), *(name for name, *_ in report["mismatched_keys"])]
    return [name for name in new if name.startswith(f"{prefix}.") and ".pooler." not in name]
