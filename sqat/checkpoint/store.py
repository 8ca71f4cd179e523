"""The checkpoint: one directory that explains itself, one value in memory.

A directory holds what transformers needs to load the model (`config.json`, tokenizer files,
`model.safetensors` with zeros in place), the masks and activation bounds in `sqat.safetensors`, the
manifest `sqat.json` (`sqat.checkpoint.manifest`) with a digest of every file, and the recipe verbatim. It is written
beside and renamed; loading checks the version, every digest, the shapes and the N:M claim. Nothing is unpickled. In
memory every linear's weight is [out, in]; those that the model's own files have as [in, out] (GPT-2's Conv1D) are
named in `layout.json` and turned at the file, both ways. Left out: files over what memory holds (a model is at most a
few times its weights here).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from sqat.checkpoint.disk import sync_directory, write_synced
from sqat.checkpoint.manifest import (
    LAYOUT,
    MANIFEST,
    RECIPE,
    REMAKE,
    STATE,
    WEIGHTS,
    LayerRecord,
    Manifest,
    load_manifest,
    manifest_digest,
    read_verified,
)
from sqat.errors import SqatError
from sqat.sparsity.masks import count_violations, pack_bits, unpack_bits
from sqat.sparsity.pattern import parse_pattern


@dataclass(frozen=True)
class Checkpoint:
    """A model between two stages.

    Attributes:
        files: config, tokenizer and (after export) ONNX files by name.
        weights: plain float weights under the model's own names, linears' [out, in], pruned ones +0.0.
        masks: layer -> bool mask shaped as the layer's weight, True = kept.
        amax: activation site -> 0-d float32 bound.
    """

    manifest: Manifest
    files: dict[str, bytes] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    amax: dict[str, Tensor] = field(default_factory=dict)
    recipe: str = ""


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint directory whole or not at all, replacing an older one of the same name."""
    check_claims(checkpoint, str(directory))
    contents = dict(checkpoint.files)
    if checkpoint.weights:
        turned = turn(checkpoint.weights, checkpoint.files, directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in turned.items()}
        contents[WEIGHTS] = tensor_bytes(tensors, metadata={"format": "pt"})
    if checkpoint.masks or checkpoint.amax:
        state = {f"{layer}.mask": pack_bits(mask.cpu()) for layer, mask in checkpoint.masks.items()}
        state |= {f"{site}.amax": amax.detach().cpu().clone() for site, amax in checkpoint.amax.items()}
        contents[STATE] = tensor_bytes(state)
    contents[RECIPE] = checkpoint.recipe.encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    manifest: dict[str, Any] = checkpoint.manifest.model_copy(update={"files": digests}).model_dump(mode="json")
    manifest["sha256"] = manifest_digest(manifest)
    contents[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    write_directory(contents, directory)


def write_directory(contents: Mapping[str, bytes], directory: Path) -> None:
    """Write files to a neighbour of ``directory``, fsync them, then rename it into place."""
    fresh = directory.with_name(f".{directory.name}.new")
    stale = directory.with_name(f".{directory.name}.old")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        settle(directory, fresh, stale)
        fresh.mkdir()
        for name, content in contents.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(fresh / name, content)
        for folder in {(fresh / name).parent for name in contents}:
            sync_directory(folder)
        if directory.exists():
            directory.rename(stale)
        fresh.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise SqatError(
            f"cannot be written: {error.strerror or error}",
            "free space or choose another folder",
            str(directory),
        ) from error
    finally:
        settle(directory, fresh, stale)


def settle(directory: Path, fresh: Path, stale: Path) -> None:
    """Put the older directory back where a write ended between its two renames, and drop what is left over."""
    if stale.exists() and not directory.exists():
        stale.rename(directory)
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint and verify all it claims; anything amiss is one SqatError naming the file."""
    manifest = load_manifest(directory)
    contents = {name: read_verified(directory, name, digest) for name, digest in manifest.files.items()}
    weights = turn(read_tensors(contents.pop(WEIGHTS, b""), directory / WEIGHTS), contents, directory)
    state = read_tensors(contents.pop(STATE, b""), directory / STATE)
    recipe = contents.pop(RECIPE, b"").decode()
    amax = {name.removesuffix(".amax"): tensor for name, tensor in state.items() if name.endswith(".amax")}
    packed = {name.removesuffix(".mask"): tensor for name, tensor in state.items() if name.endswith(".mask")}
    masks = {layer: read_mask(layer, bits, weights, directory / STATE) for layer, bits in packed.items()}
    checkpoint = Checkpoint(manifest, contents, weights, masks, amax, recipe)
    check_claims(checkpoint, str(directory))
    return checkpoint


def layout_of(layers: Sequence[str]) -> bytes:
    """Content of `LAYOUT`."""
    return (json.dumps({"transposed": list(layers)}, indent=2) + "\n").encode()


def turn(weights: Mapping[str, Tensor], files: Mapping[str, bytes], directory: Path) -> dict[str, Tensor]:
    """Weights from memory to file or back: the transposes of those that `LAYOUT` names, all others as they are."""
    if LAYOUT not in files or not weights:
        return dict(weights)
    try:
        names = [f"{layer}.weight" for layer in json.loads(files[LAYOUT])["transposed"]]
        turned = {name: weights[name].t().contiguous() for name in names}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SqatError("does not name the linears of this model", REMAKE, str(directory / LAYOUT)) from error
    return {**weights, **turned}


def read_mask(layer: str, packed: Tensor, weights: Mapping[str, Tensor], path: Path) -> Tensor:
    """Unpack a mask to the shape of its layer's weight."""
    try:
        return unpack_bits(packed, tuple(weights[f"{layer}.weight"].shape))
    except (KeyError, ValueError) as error:
        raise SqatError(f"the mask of {layer} does not fit its weight", REMAKE, str(path)) from error


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Parse a safetensors file, tensors by name (its reader has another order each time); empty content is none."""
    if not content:
        return {}
    try:
        return dict(sorted(parse_tensors(content).items()))
    except SafetensorError as error:
        raise SqatError(f"is not a safetensors file ({error})", REMAKE, str(path)) from error


def check_claims(checkpoint: Checkpoint, place: str) -> None:
    """Check that every mask has its pattern, every pruned weight is exactly +0.0 and every site a sound bound.

    A mask may keep fewer than N of M (a step of a progressive schedule is checked as the N:M of its record).
    """
    for layer, record in checkpoint.manifest.layers.items():
        if record.pattern and layer not in checkpoint.masks and checkpoint.weights:
            raise SqatError(f"{layer} is said to be {record.pattern} but has no mask", REMAKE, place)
    for layer, mask in checkpoint.masks.items():
        weight = checkpoint.weights.get(f"{layer}.weight")
        if weight is None or weight.shape != mask.shape:
            raise SqatError(f"the mask of {layer} does not fit its weight", REMAKE, place)
        if weight[~mask].view(INTEGERS[weight.element_size()]).any():
            raise SqatError(f"{layer} has a pruned weight that is not +0.0", REMAKE, place)
        record = checkpoint.manifest.layers.get(layer, LayerRecord())
        if record.pattern and (bad := violations(layer, mask, record.pattern, place)):
            raise SqatError(f"{layer} is said to be {record.pattern} but {bad} groups keep more", REMAKE, place)
    for site, amax in checkpoint.amax.items():
        if amax.dim() or not amax.is_floating_point() or not 0 < float(amax) < float("inf"):
            raise SqatError(f"the bound of {site} is not one positive number", REMAKE, place)
    for site, found in checkpoint.manifest.sites.items():
        if checkpoint.weights and found.shared_with not in checkpoint.amax:
            raise SqatError(f"{site} has no bound: {found.shared_with} is not in {STATE}", REMAKE, place)


def violations(layer: str, mask: Tensor, pattern: str, place: str) -> int:
    """Groups of a mask that keep more than the pattern; a pattern that cannot be is told as a mistake."""
    try:
        return count_violations(mask, parse_pattern(pattern))
    except ValueError as error:
        raise SqatError(f"{layer} is said to be {pattern}, which it cannot be: {error}", REMAKE, place) from error


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def quantized_layers(checkpoint: Checkpoint) -> list[str]:
    """Layers whose weights are int8."""
    return [name for name, record in checkpoint.manifest.layers.items() if record.quantized]
