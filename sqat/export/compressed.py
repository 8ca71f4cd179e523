"""The `compressed-tensors` folder (rule C22): int8 weights that transformers loads by itself, and its check.

What: `write_compressed` turns a calibrated checkpoint into config.json with a ``quantization_config``, tokenizer
files and a model.safetensors in which each quantized linear is stored as ``weight`` int8 [N,K], ``weight_scale``
float32 [N,1] and ``input_scale`` float32 [1]; `check_compressed` says what of a folder, whoever wrote it, is not so.

Why this format: ``int-quantized`` with symmetric weights per channel and symmetric static inputs per tensor says
exactly what placement `linear` trains, number by number. Nothing is compressed by the zeros: they are kept in
place, since ``sparsity_config`` is refused or ignored by every reader of today.
Left out: what the format has no name for, or no reader: attention products, residual adds and linear outputs of
placement `tensorrt` stay float here, and the notes say so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from sqat.checkpoint.manifest import LAYOUT, SIDE_FILES, WEIGHTS
from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.quantization.fake_quant import HIGH, quantize_weight
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern

FOLDER = "compressed-tensors"
CONFIG = "config.json"


def write_compressed(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """Write a calibrated checkpoint as a compressed-tensors folder.

    Args:
        checkpoint: quantized, with weights; its manifest names every linear of the model.

    Returns:
        Contents by name, each beginning with ``compressed-tensors/``; and notes: what of the checkpoint's
        quantization the folder cannot express.

    Raises:
        SqatError: no layer is quantized, or a quantized layer has no input scale.
    """
    layers = [name for name, record in checkpoint.manifest.layers.items() if record.quantized]
    if not layers:
        raise SqatError("target compressed-tensors needs quantized layers", "put a calibrate stage before it")
    if float_inputs := [name for name in layers if f"{name}:input" not in checkpoint.manifest.sites]:
        raise SqatError(f"layer {float_inputs[0]} has no input scale, which target compressed-tensors needs")
    if LAYOUT in checkpoint.files:
        raise SqatError("target compressed-tensors is for linears, and this model's layers are Conv1D in transformers",
                        "leave it out of stages.export.targets")  # fmt: skip
    ignored = [name for name, record in checkpoint.manifest.layers.items() if not record.quantized]
    config = json.loads(checkpoint.files[CONFIG])
    config["quantization_config"] = {**QUANTIZATION, "ignore": ignored}
    files = {name: content for name, content in checkpoint.files.items() if Path(name).suffix in SIDE_FILES}
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    files[WEIGHTS] = tensor_bytes(stored_tensors(checkpoint, layers), metadata={"format": "pt"})
    return {f"{FOLDER}/{name}": content for name, content in files.items()}, list(notes(checkpoint))


def stored_tensors(checkpoint: Checkpoint, layers: list[str]) -> dict[str, Tensor]:
    """The checkpoint's weights, those of ``layers`` as integers with their scales."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    for name in layers:
        integers, scale = quantize_weight(tensors[f"{name}.weight"])
        amax = checkpoint.amax[checkpoint.manifest.sites[f"{name}:input"].shared_with]
        tensors[f"{name}.weight"] = integers
        tensors[f"{name}.weight_scale"] = scale.float()[:, None].contiguous()
        tensors[f"{name}.input_scale"] = (amax.detach().cpu().float() / HIGH).reshape(1)
    return tensors


def notes(checkpoint: Checkpoint) -> Iterator[str]:
    """One line about the sites that are left float; none where all are inputs of linears."""
    roles = (site.rpartition(":")[2] for site in checkpoint.manifest.sites)
    counts = Counter(ROLES.get(role, "residual add") for role in roles if role != "input")
    if counts:
        listed = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items())
        yield (
            f"{sum(counts.values())} activation sites ({listed}) stay float: the format names "
            "the inputs of linears only, so logits differ from the quantized model's by what those sites round"
        )


def check_compressed(folder: Path, pruned: Mapping[str, str] | None = None) -> list[str]:
    """Say what in a folder breaks rule C22, one line each; empty where nothing does.

    Args:
        folder: with config.json and model.safetensors.
        pruned: layer -> pattern (``2:4``) that its integers must have.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        return [f"{name} is missing" for name in missing]
    return check_contents({name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}, pruned)


def check_contents(files: Mapping[str, bytes], pruned: Mapping[str, str] | None = None) -> list[str]:
    """Do as `check_compressed` for contents that are not on a disk yet, by name without the folder's."""
    try:
        config, tensors = json.loads(files[CONFIG]), parse_tensors(files[WEIGHTS])
    except (ValueError, SafetensorError) as error:
        return [f"{CONFIG} or {WEIGHTS} cannot be read: {error}"]
    found = entry(entry({"config": config}, "config"), "quantization_config")
    if not found:
        return [f"{CONFIG} has no quantization_config"]
    return [*check_config(found), *check_tensors(tensors, set(found.get("ignore") or ()), pruned or {})]


def check_config(found: Mapping[str, Any]) -> Iterator[str]:
    """Format and scheme: static symmetric int8, weights per channel, inputs per tensor, nothing about sparsity."""
    for name in ("sparsity_config", "kv_cache_scheme"):
        if found.get(name):
            yield f"quantization_config has a {name}, which readers refuse or ignore"
    for name in ("quant_method", "format", "quantization_status"):
        if found.get(name) != QUANTIZATION[name]:
            yield f"quantization_config.{name} is {found.get(name)!r}, must be {QUANTIZATION[name]!r}"
    groups = entry(found, "config_groups")
    if not groups:
        yield "quantization_config.config_groups holds no group"
    for title in groups:
        group = entry(groups, title)
        for part, wanted in SCHEME.items():
            given = entry(group, part)
            for key, value in wanted.items():
                if given.get(key) != value:
                    yield f"{title}.{part}.{key} is {given.get(key)!r}, must be {value!r}"
        if group.get("output_activations"):
            yield f"{title}.output_activations are quantized, which only transformers computes"


def entry(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An entry that should be an object, empty where it is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def check_tensors(tensors: Mapping[str, Tensor], ignored: set[str], pruned: Mapping[str, str]) -> Iterator[str]:
    """Types, shapes and values of every linear, the list of the others, and the zeros."""
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if not layers:
        yield "no layer has a weight_scale"
    for layer in layers:
        yield from check_layer(layer, tensors)
        if layer in ignored:
            yield f"{layer} is quantized and in the ignore list"
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and name.endswith(".weight") and f"{layer}.bias" in tensors
        if linear and tensor.is_floating_point() and layer not in ignored:
            yield f"{layer} is a float linear and not in the ignore list"
        if name.endswith("_zero_point"):
            yield f"{name}: symmetric quantization stores no zero point"
    yield from (f"{layer} is in the ignore list and has no weight" for layer in ignored
                if f"{layer}.weight" not in tensors)  # fmt: skip
    for layer, text in pruned.items():
        yield from check_pattern(layer, tensors.get(f"{layer}.weight"), text)


def check_layer(layer: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """One linear: int8 [N,K] in [-127, 127], scales [N,1] and [1]."""
    weight = tensors.get(f"{layer}.weight")
    if weight is None or weight.dtype != torch.int8 or weight.dim() != 2:
        yield f"{layer}.weight is not an int8 matrix"
        return
    if int(weight.min()) < -HIGH:
        yield f"{layer}.weight holds -128"
    for name, shape in (("weight_scale", (len(weight), 1)), ("input_scale", (1,))):
        scale = tensors.get(f"{layer}.{name}")
        if scale is None or not scale.is_floating_point() or tuple(scale.shape) != shape:
            yield f"{layer}.{name} is not a float tensor of shape {list(shape)}"
        elif not bool((scale.isfinite() & (scale > 0)).all()):
            yield f"{layer}.{name} is not positive and finite"


def check_pattern(layer: str, weight: Tensor | None, text: str) -> Iterator[str]:
    """The N:M that a layer is said to have, along K, on the values as stored."""
    pattern = parse_pattern(text)
    if weight is None or weight.dim() != 2 or weight.shape[1] % pattern.m:
        yield f"{layer} is said to be {text} and has no weight that could be"
    elif bad := count_violations(weight, pattern):
        yield f"{layer}.weight is said to be {text}, but {bad} groups hold more"


SCHEME: dict[str, dict[str, Any]] = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"linears": {"targets": ["Linear"], **SCHEME, "output_activations": None}},
    "kv_cache_scheme": None,
}
ROLES = {
    "output": "linear output",
    **dict.fromkeys(("query", "key", "softmax", "value"), "attention product operand"),
}
