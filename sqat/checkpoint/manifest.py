"""`sqat.json`: what a checkpoint says of itself, and the digests of its files.

Apart from `sqat.checkpoint.store`, since plans, gates and reports ask what was done and have no use for the tensors:
torch is not imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from sqat.errors import SqatError

FORMAT = 1
MANIFEST, WEIGHTS, STATE, RECIPE = "sqat.json", "model.safetensors", "sqat.safetensors", "recipe.yaml"
HISTOGRAMS = "histograms.json"  # what a calibrate stage saw: `sqat.stages.calibrate.summarize`
LAYOUT = "layout.json"  # which linears' weights lie in the file as [in, out]
SIDE_FILES = (".json", ".txt", ".model", ".jinja")  # endings of config and tokenizer files
REMAKE = "run the stage again with --force, or use another checkpoint"

# JSON has no infinity (a PNR without a discordant pair), so such a figure is kept as its name.
Figure = Annotated[
    float,
    BeforeValidator(lambda x: float(x) if isinstance(x, str) else x),
    PlainSerializer(lambda x: x if abs(x) < float("inf") else str(x), when_used="json"),
]


class LayerRecord(BaseModel):
    """What was done to one linear layer, and why not where nothing was."""

    model_config = ConfigDict(extra="forbid")

    pattern: str = ""
    quantized: bool = False
    dense_because: str = ""
    float_because: str = ""


class SiteRecord(BaseModel):
    """One activation site: the site whose quantizer it shares, and how much calibration clipped."""

    model_config = ConfigDict(extra="forbid")

    shared_with: str
    saturated: float | None


class Manifest(BaseModel):
    """`sqat.json`; ``sha256`` is of all its other entries, so that no changed byte goes unseen.

    ``retry_multiplier`` is the factor that ``retry`` had put on the steps of this attempt.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    stage: str
    type: Literal["train", "prune", "calibrate", "qat", "export"]
    key: str
    input_digests: dict[str, str] = {}
    base_model: str
    seed: int
    versions: dict[str, str] = {}
    metrics: dict[str, dict[str, Figure]] = {}
    layers: dict[str, LayerRecord] = {}
    sites: dict[str, SiteRecord] = {}
    skipped: dict[str, str] = {}
    placement: str = ""
    notes: list[str] = []
    overrides: list[str] = []
    attempt: int = 1
    retry_multiplier: float = 1.0
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = {}
    history: list[dict[str, Figure]] = []
    files: dict[str, str] = {}
    sha256: str = ""


def load_manifest(directory: Path) -> Manifest:
    """Read `sqat.json` alone: cheap, for plans."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise SqatError("no such checkpoint folder", "give the folder of a finished stage", str(directory))
    if not path.is_file():
        raise SqatError("the folder is no sqat checkpoint: it has no sqat.json", "give the folder of a finished stage",
                        str(directory))  # fmt: skip
    try:
        raw: Any = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise SqatError(f"cannot be read as JSON ({error})", REMAKE, str(path)) from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version < 1:
        raise SqatError(f"has no valid format version, got {version!r}", REMAKE, str(path))
    if version > FORMAT:
        raise SqatError(f"format {version} is newer than this sqat reads ({FORMAT})", "upgrade sqat", str(path))
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SqatError(f"the manifest's {where} is not valid", REMAKE, str(path)) from error
    if manifest_digest(raw) != manifest.sha256:
        raise SqatError("the manifest is not what its own sha256 says: it was changed or damaged", REMAKE, str(path))
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's entries but this digest itself, in one order and without layout."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_verified(directory: Path, name: str, digest: str) -> bytes:
    """Read one file named by a manifest and compare its sha256."""
    path = directory / name
    parts = name.split("/")
    # A runtime may want a folder, a sentence encoder one in it; NUL and half a surrogate pair are in no path.
    if not name.isprintable() or len(parts) > 3 or {"", ".", ".."} & set(parts):
        raise SqatError(
            f"the manifest names a file outside the checkpoint: {name!r}", REMAKE, str(directory / MANIFEST)
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SqatError(
            f"a file of the checkpoint is missing or unreadable ({error.strerror})", REMAKE, str(path)
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise SqatError("the content is not what the manifest's sha256 says: the file was changed or damaged", REMAKE,
                        str(path))  # fmt: skip
    return content


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file of a checkpoint with its manifest, and load none; SqatError names the first that differs."""
    for name, digest in manifest.files.items():
        read_verified(directory, name, digest)
