"""The checkpoint: one folder on disk that explains itself, one value in memory.

The folder is written beside its place and renamed; loading verifies digests, shapes, masks and amax. Weights are
memory-mapped, exported files stay paths, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqat.checkpoint.manifest import (
    LAYOUT,
    MANIFEST,
    RECIPE,
    STATE,
    WEIGHTS,
    LayerRecord,
    Manifest,
    damaged,
    file_digest,
    load_manifest,
    manifest_digest,
    verify_files,
)
from sqat.errors import SqatError
from sqat.files.read import parse_json, read_bytes, read_text
from sqat.files.replace import UNFINISHED, replace_directory, write_synced
from sqat.sparsity.masks import count_violations, pack_bits, unpack_bits
from sqat.sparsity.pattern import parse_pattern

ARTIFACTS = (".onnx", ".data", ".safetensors")  # suffixes of exported files that may be too large for memory
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Checkpoint:
    """A model between two stages.

    Attributes:
        files: contents of config, tokenizer and other small files by name.
        weights: float weights under the model's own names; linears' [out, in], pruned values +0.0.
        masks: layer -> bool mask of the weight's shape, True = kept.
        amax: activation site -> 0-d float32.
        artifacts: exported files by name, which stay on disk.
    """

    manifest: Manifest
    files: dict[str, bytes] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    amax: dict[str, Tensor] = field(default_factory=dict)
    recipe: str = ""
    artifacts: dict[str, Path] = field(default_factory=dict)


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint folder whole or not at all, and replace an older one.

    Raises:
        SqatError: the checkpoint contradicts its manifest, or the folder cannot be written.
    """
    check_claims(checkpoint, directory)
    weights = transpose_stored(checkpoint.weights, checkpoint.files, directory)
    state = {f"{layer}.mask": pack_bits(mask.cpu()) for layer, mask in checkpoint.masks.items()}
    state |= {f"{site}.amax": amax.detach().cpu().clone() for site, amax in checkpoint.amax.items()}
    with replace_directory(directory, MANIFEST) as folder:
        for name, content in {**checkpoint.files, RECIPE: checkpoint.recipe.encode()}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(folder / name, content)
        for name, path in checkpoint.artifacts.items():
            link_file(path, folder / name)
        if weights:
            write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
        if state:
            write_tensors(folder / STATE, state)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        digests = {name: file_digest(folder / name) for name in names if name != UNFINISHED}
        manifest: dict[str, Any] = checkpoint.manifest.model_copy(update={"files": digests}).model_dump(mode="json")
        manifest["sha256"] = manifest_digest(manifest)
        write_synced(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other file.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # its own class for a full disk, which is no OSError
        raise OSError(str(error)) from error
    path.chmod(mode)


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint folder and verify it.

    Raises:
        SqatError: it names the file that is missing, damaged or contradicts the manifest.
    """
    manifest = load_manifest(directory)
    paths = verify_files(directory, manifest)
    stored = {name: read_tensors(paths.pop(name)) for name in (WEIGHTS, STATE) if name in paths}
    recipe = read_text(paths.pop(RECIPE)) if RECIPE in paths else ""
    artifacts = {name: path for name, path in paths.items() if path.suffix in ARTIFACTS}
    files = {name: read_bytes(path) for name, path in paths.items() if name not in artifacts}
    weights = transpose_stored(stored.get(WEIGHTS, {}), files, directory)
    masks, amax = {}, {}
    for name, tensor in stored.get(STATE, {}).items():
        key, _, kind = name.rpartition(".")
        if kind == "mask":
            masks[key] = read_mask(key, tensor, weights, directory / STATE)
        elif kind == "amax":
            amax[key] = tensor
    checkpoint = Checkpoint(manifest, files, weights, masks, amax, recipe, artifacts)
    check_claims(checkpoint, directory)
    return checkpoint


def layout_of(layers: Sequence[str]) -> bytes:
    """Make the content of `LAYOUT` for layers whose weights are stored as [in, out]."""
    return (json.dumps({"transposed": list(layers)}, indent=2) + "\n").encode()


def transpose_stored(weights: Mapping[str, Tensor], files: Mapping[str, bytes], directory: Path) -> dict[str, Tensor]:
    """Transpose the weights that `LAYOUT` names: from [out, in] to [in, out], or back."""
    if LAYOUT not in files or not weights:
        return dict(weights)
    try:
        names = [f"{layer}.weight" for layer in parse_json(files[LAYOUT], str(directory / LAYOUT))["transposed"]]
        return {**weights, **{name: weights[name].t().contiguous() for name in names}}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged("does not name the linears of this model", directory / LAYOUT) from error


def read_mask(layer: str, packed: Tensor, weights: Mapping[str, Tensor], path: Path) -> Tensor:
    """Unpack a mask to the shape of its layer's weight."""
    try:
        return unpack_bits(packed, tuple(weights[f"{layer}.weight"].shape))
    except (KeyError, ValueError) as error:
        raise damaged(f"the mask of {layer} does not fit its weight", path) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; return its tensors sorted by name, since the reader has no fixed order."""
    try:
        return dict(sorted(load_file(path).items()))
    except (SafetensorError, OSError) as error:
        raise damaged(f"is not a safetensors file ({error})", path) from error


def check_claims(checkpoint: Checkpoint, place: Path) -> None:
    """Check that masks keep their pattern, that pruned weights are +0.0 and that each site has a positive amax.

    A mask may keep fewer than N of M weights, as between two steps of a progressive schedule.
    """
    for layer, record in checkpoint.manifest.layers.items():
        if record.pattern and layer not in checkpoint.masks and checkpoint.weights:
            raise damaged(f"{layer} is said to be {record.pattern} but has no mask", place)
    for layer, mask in checkpoint.masks.items():
        weight = checkpoint.weights.get(f"{layer}.weight")
        if weight is None or weight.shape != mask.shape:
            raise damaged(f"the mask of {layer} does not fit its weight", place)
        if weight[~mask].view(INTEGERS[weight.element_size()]).any():
            raise damaged(f"{layer} has a pruned weight that is not +0.0", place)
        record = checkpoint.manifest.layers.get(layer, LayerRecord())
        if record.pattern and (bad := violations(layer, mask, record.pattern, place)):
            raise damaged(f"{layer} is said to be {record.pattern} but {bad} groups keep more", place)
    for site, amax in checkpoint.amax.items():
        if amax.dim() or not amax.is_floating_point() or not 0 < float(amax) < float("inf"):
            raise damaged(f"the amax of {site} is not one positive number", place)
    for site, entry in checkpoint.manifest.sites.items():
        if checkpoint.weights and entry.shared_with not in checkpoint.amax:
            raise damaged(f"{site} has no amax: {entry.shared_with} is not in {STATE}", place)


def violations(layer: str, mask: Tensor, pattern: str, place: Path) -> int:
    """Count the groups of a mask that keep more weights than the pattern allows."""
    try:
        return count_violations(mask, parse_pattern(pattern))
    except ValueError as error:
        raise damaged(f"{layer} is said to be {pattern}, which it cannot be: {error}", place) from error


def quantized_layers(checkpoint: Checkpoint) -> list[str]:
    """List the layers whose weights are int8."""
    return [name for name, record in checkpoint.manifest.layers.items() if record.quantized]


def require_weights(checkpoint: Checkpoint, directory: Path) -> None:
    """Refuse a folder of exported files where a model in torch is needed.

    Raises:
        SqatError: the checkpoint has no weights; the hint names the exported models in the folder.
    """
    if not checkpoint.weights:
        models = sorted({name.partition("/")[0] for name in checkpoint.manifest.files if is_model(name)})
        raise SqatError("the folder is an export without torch weights", f"give what is in it: {', '.join(models)}",
                        str(directory), code="not-a-checkpoint")  # fmt: skip


def is_model(name: str) -> bool:
    """Whether a file of an export is an ONNX file, or lies in a runtime's folder."""
    return name.endswith(".onnx") or "/" in name
