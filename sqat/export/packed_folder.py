"""The folder of target `torch-semi-structured`: its content, its writer and its verifying reader.

    sparse.safetensors   of each packed layer L: `L.values`, `L.metadata`, and of int8 ones `L.weight_scale` [N] and
                         `L.input_scale` []; `SITE.amax` of the other activation sites; every other tensor of the model
    sparse.json          `SparseManifest`
    config.json, tokenizer files

The name differs from `model.safetensors`, or transformers would load the dense half and invent the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sqat.checkpoint.manifest import damaged, file_digest, manifest_digest, verify_file
from sqat.checkpoint.store import read_tensors, write_tensors
from sqat.errors import SqatError
from sqat.files.read import read_bytes, read_json
from sqat.quantization.fake_quant import HIGH
from sqat.sparsity.semi_structured import Order, SemiStructured, unpack

FORMAT = 1
FOLDER, MANIFEST, TENSORS = "semi-structured", "sparse.json", "sparse.safetensors"
Type = Literal["int8", "float16", "bfloat16"]


class PackedLayer(BaseModel):
    """One packed linear of ``shape`` (N, K); ``order`` is of its metadata, ``backends`` accept its shape."""

    model_config = ConfigDict(extra="forbid")

    type: Type
    shape: tuple[int, int]
    pattern: str
    order: Order
    backends: tuple[str, ...]


class SparseManifest(BaseModel):
    """The content of `sparse.json`.

    ``dense`` maps a linear that is not packed to the reason; ``sites`` an activation site that stays fake-quantized to
    the site whose amax it shares; ``bytes`` a type to the size of the packed layers' weights.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    key: str
    base_model: str
    versions: dict[str, str]
    layers: dict[str, PackedLayer]
    dense: dict[str, str]
    sites: dict[str, str]
    bytes: dict[str, int]
    files: dict[str, str] = {}
    sha256: str = ""


class Scales(NamedTuple):
    """Scales of an int8 layer: ``input`` float32 [], ``weight`` float32 [N], all positive."""

    input: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Packed:
    """A folder in memory.

    Attributes:
        layers: packed weights by layer.
        scales: of int8 layers.
        dense: the model's other tensors by its own names.
        amax: activation site -> 0-d float32.
        files: config and tokenizer files by name.
        place: of the tensors, for messages.
    """

    manifest: SparseManifest
    layers: dict[str, SemiStructured]
    scales: dict[str, Scales]
    dense: dict[str, Tensor]
    amax: dict[str, Tensor]
    files: dict[str, bytes]
    place: str


def write_folder(
    folder: Path, manifest: SparseManifest, tensors: Mapping[str, Tensor], files: Mapping[str, bytes]
) -> None:
    """Write the folder: tensors, config and tokenizer files, and `sparse.json` with their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    digests = {name: file_digest(folder / name) for name in sorted([*files, TENSORS])}
    entries: dict[str, Any] = manifest.model_copy(update={"files": digests}).model_dump(mode="json")
    entries["sha256"] = manifest_digest(entries)
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> Packed:
    """Read a folder and verify all it claims; tensors are memory-mapped.

    Raises:
        SqatError: it is no such folder, a file is missing or changed, or a tensor is not what `sparse.json` says.
    """
    if not (folder / MANIFEST).is_file():
        raise SqatError(f"the folder has no {MANIFEST}", "give a folder of target torch-semi-structured", str(folder),
                        code="not-a-checkpoint")  # fmt: skip
    manifest = read_manifest(folder / MANIFEST)
    paths = {name: verify_file(folder, name, digest, MANIFEST) for name, digest in manifest.files.items()}
    tensors = read_tensors(paths.pop(TENSORS)) if TENSORS in paths else {}
    files = {name: read_bytes(path) for name, path in paths.items()}
    return sort_tensors(manifest, tensors, files, folder / TENSORS)


def read_manifest(path: Path) -> SparseManifest:
    """Read `sparse.json`."""
    try:
        raw = read_json(path)
    except SqatError as error:
        raise damaged(error.problem, path) from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise SqatError(f"has format {version!r}, this sqat reads {FORMAT}", "export it with this version", str(path),
                        code="newer-format")  # fmt: skip
    try:
        manifest = SparseManifest.model_validate(raw)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise damaged(f"the entry {where} is not valid", path) from error
    if manifest_digest(raw) != manifest.sha256:
        raise damaged("is not what its own sha256 says: it was changed or damaged", path)
    return manifest


def sort_tensors(
    manifest: SparseManifest, tensors: Mapping[str, Tensor], files: dict[str, bytes], place: Path
) -> Packed:
    """Sort the tensors by their use; check each packed layer and amax."""
    rest = dict(tensors)
    layers, scales, amax = {}, {}, {}
    try:
        for name, layer in manifest.layers.items():
            layers[name] = pop_weight(rest, name, layer)
            if layer.type == "int8":
                scales[name] = pop_scales(rest, name, layer.shape[0])
        for site in dict.fromkeys(manifest.sites.values()):
            amax[site] = positive(rest.pop(f"{site}.amax"), (), f"the amax of {site}")
    except KeyError as error:
        raise damaged(f"the tensor {error.args[0]} is missing", place) from error
    except ValueError as error:
        raise damaged(str(error), place) from error
    return Packed(manifest, layers, scales, rest, amax, files, str(place))


def pop_weight(tensors: dict[str, Tensor], name: str, layer: PackedLayer) -> SemiStructured:
    """Remove a layer's packed weight from the tensors; ValueError if it is not the one described, or not 2:4."""
    values, metadata = tensors.pop(f"{name}.values").clone(), tensors.pop(f"{name}.metadata").clone()  # off the file
    weight = SemiStructured(values, metadata, layer.order)
    if weight.shape != layer.shape or weight.values.dtype != TYPES[layer.type]:
        raise ValueError(f"{name} is {weight.values.dtype} {list(weight.shape)}, {MANIFEST} says {layer.type} "
                         f"{list(layer.shape)}")  # fmt: skip
    if layer.type == "int8" and bool((weight.values < -HIGH).any()):
        raise ValueError(f"{name} holds -128, int8 weights are within [-127, 127] (rule B7)")
    try:
        unpack(weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return weight


def pop_scales(tensors: dict[str, Tensor], name: str, outputs: int) -> Scales:
    """Remove an int8 layer's scales from the tensors."""
    weight, x = tensors.pop(f"{name}.weight_scale"), tensors.pop(f"{name}.input_scale")
    return Scales(positive(x, (), f"the input scale of {name}"), positive(weight, (outputs,), f"the scales of {name}"))


def positive(tensor: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """Copy a float32 tensor of a shape, finite and above 0; else ValueError."""
    sound = tensor.dtype == torch.float32 and tensor.shape == shape
    if not sound or not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise ValueError(f"{what} must be float32 {list(shape)}, finite and positive")
    return tensor.clone()


TYPES: dict[Type, torch.dtype] = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16}
