"""Target `torch-semi-structured`: pruned linears as packed 2:4 weights for torch's sparse kernels.

A pruned layer is stored as int8 if the checkpoint quantizes it, else as float16; `sparse.json` says why the others stay
dense. Quantized layers that are not packed keep weights on their int8 grid, and the amax of their input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sqat.checkpoint.manifest import LAYOUT, SIDE_FILES, LayerRecord
from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.export.packed_folder import TYPES, PackedLayer, SparseManifest, write_folder
from sqat.export.quantized_model import QuantizedModel
from sqat.export.source import FP16_NOISE, Source, TargetFile
from sqat.quantization.fake_quant import FP32_NOISE, HIGH
from sqat.sparsity.semi_structured import SHAPE_MULTIPLES, SemiStructured, pack, unsupported_reason

USAGE = """```python
from sqat.torch_sparse.load import load_model

model, processor = load_model("{file}")  # sparse kernels on an Ampere GPU or later, a reference elsewhere
```
"""


def write(source: Source, path: Path) -> TargetFile:
    """Write the folder."""
    checkpoint = source.portable_checkpoint
    write_packed(checkpoint, source.quantized, path)
    has_fp16 = any(record.pattern and not record.quantized for record in checkpoint.manifest.layers.values())
    return TargetFile(checkpoint, FP16_NOISE if has_fp16 else FP32_NOISE)


def write_packed(checkpoint: Checkpoint, quantized: QuantizedModel, folder: Path) -> None:
    """Write a pruned checkpoint as a folder of packed weights.

    Raises:
        SqatError: no layer can be packed.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()}
    packed: dict[str, SemiStructured] = {}
    dense: dict[str, str] = {}
    for name, record in checkpoint.manifest.layers.items():
        result = pack_layer(checkpoint, quantized, name, record)
        weight = tensors.pop(f"{name}.weight", None)
        if isinstance(result, SemiStructured):
            packed[name] = result
            tensors |= {f"{name}.values": result.values, f"{name}.metadata": result.metadata}
            if record.quantized:
                tensors[f"{name}.weight_scale"] = quantized.weights[name][1].float()
                tensors[f"{name}.input_scale"] = (
                    torch.tensor(quantized.amax[f"{name}:input"], dtype=torch.float32) / HIGH
                )
            continue
        dense[name] = result
        if weight is not None:
            tensors[f"{name}.weight"] = on_grid(quantized, name, weight) if record.quantized else weight
    if not packed:
        first = next((f": {name}: {reason}" for name, reason in dense.items()), "")
        pruned = any(record.pattern for record in checkpoint.manifest.layers.values())
        raise SqatError(f"target torch-semi-structured found no layer it can pack{first}",
                        "leave it out of stages.export.targets" if pruned else "prune to 2:4 before",
                        code="unsupported-target")  # fmt: skip
    facts = checkpoint.manifest
    layers = {name: describe(weight, facts.layers[name].pattern) for name, weight in packed.items()}
    sites = unpacked_sites(checkpoint, layers)
    tensors |= {f"{site}.amax": checkpoint.amax[site].detach().cpu().float() for site in sites.values()}
    manifest = SparseManifest(key=facts.fingerprint, base_model=facts.base_model, versions=facts.versions,
                              layers=layers, dense=dense, sites=sites, bytes=sizes(packed))  # fmt: skip
    files = {name: content for name, content in checkpoint.files.items()
             if Path(name).suffix in SIDE_FILES and name != LAYOUT}  # fmt: skip
    write_folder(folder, manifest, tensors, files)


def pack_layer(
    checkpoint: Checkpoint, quantized: QuantizedModel, name: str, record: LayerRecord
) -> SemiStructured | str:
    """Pack a layer, in CUTLASS' order where its shape allows; or say why it stays dense."""
    weight = checkpoint.weights.get(f"{name}.weight")
    if weight is None:
        return "its weight is kept under another layer's name"
    if not record.pattern:
        return record.dense_because or "not pruned"
    if weight.dim() != 2:
        return "a convolution, and torch has no sparse kernel for one"
    if record.quantized and f"{name}:input" not in checkpoint.manifest.sites:
        return "its input has no scale: it was not seen in calibration"
    stored = quantized.weights[name][0] if record.quantized else weight.detach().cpu().half() + 0.0
    if not record.quantized and bool(stored.isinf().any()):
        return "a weight is too large for float16"
    refusals = {
        backend: unsupported_reason(backend, (len(weight), weight[0].numel()), stored.dtype)
        for backend in SHAPE_MULTIPLES
    }
    if all(refusals.values()):
        return "; ".join(refusals.values())
    try:
        return pack(stored).to_order("rows" if refusals["cutlass"] else "cutlass")
    except ValueError as error:
        return f"{record.pattern} is not 2:4: {error}"


def on_grid(quantized: QuantizedModel, name: str, weight: Tensor) -> Tensor:
    """Integers times scale, in the shape and type of the weight."""
    integers, scale = quantized.weights[name]
    return (integers.to(scale.dtype) * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def describe(weight: SemiStructured, pattern: str) -> PackedLayer:
    """Make a layer's entry in `sparse.json`."""
    kind = next(name for name, dtype in TYPES.items() if dtype == weight.values.dtype)
    able = [
        backend for backend in SHAPE_MULTIPLES if not unsupported_reason(backend, weight.shape, weight.values.dtype)
    ]
    return PackedLayer(type=kind, shape=weight.shape, pattern=pattern, order=weight.order,
                       backends=(*able, "reference"))  # fmt: skip


def unpacked_sites(checkpoint: Checkpoint, layers: Mapping[str, PackedLayer]) -> dict[str, str]:
    """Activation sites that no packed layer quantizes itself, each with the site whose amax it shares."""
    own = {f"{name}:input" for name, layer in layers.items() if layer.type == "int8"}
    return {site: record.shared_with for site, record in checkpoint.manifest.sites.items() if site not in own}


def sizes(weights: Mapping[str, SemiStructured]) -> dict[str, int]:
    """Count the bytes of the packed weights, and of the same weights if they were dense."""
    count = sum(rows * columns for rows, columns in (weight.shape for weight in weights.values()))
    packed = sum(weight.bytes for weight in weights.values())
    return {"packed": packed, "int8": count, "float16": 2 * count, "float32": 4 * count}
