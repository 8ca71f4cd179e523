"""Target `compressed-tensors` (rule C22): int8 weights that transformers loads by itself, and their check.

Each quantized linear is stored as ``weight`` int8 [N,K], ``weight_scale`` float32 [N,1] and ``input_scale`` float32
[1]. Zeros of pruned weights stay in place: no reader of today accepts a ``sparsity_config``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqat.checkpoint.manifest import LAYOUT, SIDE_FILES, WEIGHTS
from sqat.checkpoint.store import Checkpoint, read_tensors, write_tensors
from sqat.errors import GateError, SqatError
from sqat.export.quantized_model import QuantizedModel
from sqat.export.source import Source, TargetFile, input_sites_only
from sqat.files.read import read_json
from sqat.quantization.fake_quant import HIGH
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern

CONFIG = "config.json"
USAGE = """```python
from transformers import {loader}  # with compressed-tensors installed

model = {loader}.from_pretrained("{file}")
```
"""


def write(source: Source, path: Path) -> TargetFile:
    """Write the folder and check it; sites other than inputs of linears are not in it."""
    write_compressed(source.checkpoint, source.quantized, path)
    layers = source.checkpoint.manifest.layers
    pruned = {name: record.pattern for name, record in layers.items() if record.pattern}
    if broken := check_compressed(path, pruned):
        raise GateError(f"the compressed-tensors folder breaks rule C22: {broken[0]}", "nothing was written",
                        code="broken-rule")  # fmt: skip
    return TargetFile(input_sites_only(source.checkpoint), notes=tuple(skipped_sites(source.checkpoint)))


def write_compressed(checkpoint: Checkpoint, quantized: QuantizedModel, folder: Path) -> None:
    """Write a calibrated checkpoint as a compressed-tensors folder.

    Raises:
        SqatError: a quantized layer has no input scale, or layers are convolutions or Conv1D.
    """
    if convolutions := [name for name, (integers, _) in quantized.weights.items() if integers.dim() != 2]:
        raise SqatError(f"target compressed-tensors is for linears, and layer {convolutions[0]} is a convolution",
                        "leave it out of stages.export.targets", code="unsupported-target")  # fmt: skip
    if missing := [name for name in quantized.weights if f"{name}:input" not in quantized.amax]:
        raise SqatError(f"layer {missing[0]} has no input scale, which target compressed-tensors needs",
                        code="unsupported-target")  # fmt: skip
    if LAYOUT in checkpoint.files:
        raise SqatError("target compressed-tensors is for linears, and this model's layers are Conv1D in transformers",
                        "leave it out of stages.export.targets", code="unsupported-target")  # fmt: skip
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()}
    for name, (integers, scale) in quantized.weights.items():
        amax = torch.tensor(quantized.amax[f"{name}:input"], dtype=torch.float32)
        tensors[f"{name}.weight"] = integers
        tensors[f"{name}.weight_scale"] = scale.float()[:, None]
        tensors[f"{name}.input_scale"] = (amax / HIGH).reshape(1)
    config = json.loads(checkpoint.files[CONFIG])
    ignored = [name for name, record in checkpoint.manifest.layers.items() if not record.quantized]
    ignored += float_linears(tensors)  # also those that are no nn.Linear, such as routers of experts
    config["quantization_config"] = {**QUANTIZATION, "ignore": list(dict.fromkeys(ignored))}
    files = {name: content for name, content in checkpoint.files.items() if Path(name).suffix in SIDE_FILES}
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def skipped_sites(checkpoint: Checkpoint) -> Iterator[str]:
    """Say in one line which sites stay float; nothing where all are inputs of linears."""
    roles = (site.rpartition(":")[2] for site in checkpoint.manifest.sites)
    counts = Counter(ROLES.get(role, "residual add") for role in roles if role != "input")
    if counts:
        listed = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items())
        yield (
            f"{sum(counts.values())} activation sites ({listed}) stay float: the format names "
            "the inputs of linears only, so logits differ from the quantized model's by what those sites round"
        )


def check_compressed(folder: Path, pruned: Mapping[str, str] | None = None) -> list[str]:
    """List what in a folder breaks rule C22, whoever wrote it.

    Args:
        pruned: layer -> pattern (``2:4``) that its integers must have.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        return [f"{name} is missing" for name in missing]
    try:
        config, tensors = read_json(folder / CONFIG), read_tensors(folder / WEIGHTS)
    except SqatError as error:
        return [f"{CONFIG} or {WEIGHTS} cannot be read: {error.problem}"]
    settings = entry(entry({"config": config}, "config"), "quantization_config")
    if not settings:
        return [f"{CONFIG} has no quantization_config"]
    return [*check_config(settings), *check_tensors(tensors, set(settings.get("ignore") or ()), pruned or {})]


def check_config(settings: Mapping[str, Any]) -> Iterator[str]:
    """Check the scheme: static symmetric int8, weights per channel, inputs per tensor, nothing about sparsity."""
    for name in ("sparsity_config", "kv_cache_scheme"):
        if settings.get(name):
            yield f"quantization_config has a {name}, which readers refuse or ignore"
    for name in ("quant_method", "format", "quantization_status"):
        if settings.get(name) != QUANTIZATION[name]:
            yield f"quantization_config.{name} is {settings.get(name)!r}, must be {QUANTIZATION[name]!r}"
    groups = entry(settings, "config_groups")
    if not groups:
        yield "quantization_config.config_groups holds no group"
    for title in groups:
        group = entry(groups, title)
        for part, expected in SCHEME.items():
            scheme = entry(group, part)
            for key, value in expected.items():
                if scheme.get(key) != value:
                    yield f"{title}.{part}.{key} is {scheme.get(key)!r}, must be {value!r}"
        if group.get("output_activations"):
            yield f"{title}.output_activations are quantized, which only transformers computes"


def entry(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Get an entry that should be an object; an empty one where it is none."""
    item = value.get(key)
    return item if isinstance(item, dict) else {}


def check_tensors(tensors: Mapping[str, Tensor], ignored: set[str], pruned: Mapping[str, str]) -> Iterator[str]:
    """Check the types, shapes and values of every linear, the list of the others, and the zeros."""
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if not layers:
        yield "no layer has a weight_scale"
    for layer in layers:
        yield from check_layer(layer, tensors)
        if layer in ignored:
            yield f"{layer} is quantized and in the ignore list"
    for layer in float_linears(tensors):
        if layer not in ignored:
            yield f"{layer} is a float linear and not in the ignore list"
    for name in tensors:
        if name.endswith("_zero_point"):
            yield f"{name}: symmetric quantization stores no zero point"
    yield from (f"{layer} is in the ignore list and has no weight" for layer in ignored
                if f"{layer}.weight" not in tensors)  # fmt: skip
    for layer, pattern in pruned.items():
        yield from check_pattern(layer, tensors.get(f"{layer}.weight"), pattern)


def float_linears(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules with a bias and a matrix of floats, as their tensors tell."""
    matrices = [name for name, x in tensors.items() if x.dim() == 2 and x.is_floating_point()]
    layers = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    return [layer for layer in layers if f"{layer}.bias" in tensors]


def check_layer(layer: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Check one linear: int8 [N,K] in [-127, 127], scales [N,1] and [1]."""
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
    """Check that the stored values of a layer keep its N:M pattern along K."""
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
