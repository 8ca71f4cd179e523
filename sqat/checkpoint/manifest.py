"""`sqat.json`: what a checkpoint says of itself, and the digests of its files.

Plans, gates and reports read it without the tensors, so nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from sqat.errors import SqatError
from sqat.files.read import open_file, read_json

FORMAT = 1
MANIFEST, WEIGHTS, STATE, RECIPE = "sqat.json", "model.safetensors", "sqat.safetensors", "recipe.yaml"
HISTOGRAMS = "histograms.json"  # activations that a calibrate stage saw: `sqat.stages.calibrate.summarize`
LAYOUT = "layout.json"  # names the linears whose weights are stored as [in, out]
SIDE_FILES = (".json", ".txt", ".model", ".jinja")  # suffixes of config and tokenizer files
REMAKE = "run {stage} again with --force, or use another checkpoint"
STAGE_FOLDER = re.compile(r"\d{2,}-(.+?)(\.rejected)?")

# JSON has no infinity (a PNR without a discordant pair), so such a figure is stored as its name.
Figure = Annotated[
    float,
    BeforeValidator(lambda x: float(x) if isinstance(x, str) else x),
    PlainSerializer(lambda x: x if abs(x) < float("inf") else str(x), when_used="json"),
]


class LayerRecord(BaseModel):
    """What was done to one linear or convolution, and why anything was not done."""

    model_config = ConfigDict(extra="forbid")

    pattern: str = ""
    quantized: bool = False
    dense_because: str = ""
    float_because: str = ""


class SiteRecord(BaseModel):
    """One activation site: whose amax it shares, the share of values that are clipped, how a choice fell."""

    model_config = ConfigDict(extra="forbid")

    shared_with: str
    saturated: float | None
    method: str = ""


class Manifest(BaseModel):
    """The content of `sqat.json`.

    ``retry_multiplier`` multiplied the steps of this attempt; ``skipped`` maps a site to the reason why it stays float.
    ``recipe_file`` is the name of the recipe that ``recipe.yaml`` is a copy of.
    ``files`` maps names to sha256; the entry ``sha256`` is of all other entries, so that no changed byte goes unseen.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    stage: str
    type: Literal["train", "prune", "reconstruct", "calibrate", "qat", "export"]
    fingerprint: str
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
    recipe_file: str = ""
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
    """Read and verify `sqat.json` alone.

    Raises:
        SqatError: the folder is no checkpoint, or its manifest is damaged or of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        problem = f"the folder has no {MANIFEST}" if directory.is_dir() else "no such checkpoint folder"
        raise SqatError(problem, "give the folder of a finished stage", str(directory), code="not-a-checkpoint")
    try:
        raw: Any = read_json(path)
    except SqatError as error:
        raise damaged(error.problem, path) from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version < 1:
        raise damaged(f"has no valid format version, got {version!r}", path)
    if version > FORMAT:
        raise SqatError(f"format {version} is newer than this sqat reads ({FORMAT})", "upgrade sqat", str(path),
                        code="newer-format")  # fmt: skip
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        entry = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise damaged(f"the manifest's {entry} is not valid", path) from error
    if manifest_digest(raw) != manifest.sha256:
        raise damaged("the manifest is not what its own sha256 says: it was changed or damaged", path)
    return manifest


def content_digest(manifest: Manifest) -> str:
    """Compute the sha256 of what a stage makes from the same inputs: no times, versions, or copy of the recipe."""
    entries = manifest.model_dump(mode="json", exclude={"seconds", "overrides", "versions", "recipe_file"})
    entries["files"] = {name: digest for name, digest in manifest.files.items() if name != RECIPE}
    return manifest_digest(entries)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Compute the sha256 of a manifest's entries without ``sha256``, whatever their order and layout."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def verify_files(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Compare every file of a checkpoint with its sha256 in the manifest.

    Returns:
        The path of each file, by name.

    Raises:
        SqatError: it names the first file that is missing, changed or outside the folder.
    """
    return {name: verify_file(directory, name, digest) for name, digest in manifest.files.items()}


def verify_file(directory: Path, name: str, digest: str, manifest: str = MANIFEST) -> Path:
    """Compare one file with its sha256; return its path."""
    path, parts = directory / name, name.split("/")
    # A target's folder may hold a sentence encoder's folder. NUL and half a surrogate pair are in no path.
    if not name.isprintable() or len(parts) > 3 or {"", ".", ".."} & set(parts):
        raise damaged(f"the manifest names a file outside the folder: {name!r}", directory / manifest)
    try:
        actual = file_digest(path)
    except (OSError, SqatError) as error:
        reason = error.problem if isinstance(error, SqatError) else error.strerror
        raise damaged(f"the file is missing or unreadable ({reason})", path) from error
    if actual != digest:
        raise damaged("the content is not what the manifest's sha256 says: the file was changed or damaged", path)
    return path


def file_digest(path: Path) -> str:
    """Compute the sha256 of a file, in blocks."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def damaged(problem: str, place: Path) -> SqatError:
    """Make the error for a checkpoint that is not what it says."""
    matches = (STAGE_FOLDER.fullmatch(part) for part in reversed(place.parts))
    stage = next((f"stage {match[1]}" for match in matches if match), "the stage that wrote it")
    return SqatError(problem, REMAKE.format(stage=stage), str(place), code="damaged-checkpoint")
