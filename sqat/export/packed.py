"""The `torch-semi-structured` target: pruned linears as packed 2:4 weights that torch's sparse kernels take.

A pruned layer becomes int8 where the checkpoint quantizes it (the integers and scales its fake quantizer computes
with), else float16. It is stored in CUTLASS' order where its shape allows, as CUTLASS takes it; cuSPARSELt's form can
be made on its GPU only, from the dense weight that the loader unpacks. Other linears stay dense floats, with the
reason in `sparse.json`: one that is quantized but not packed keeps its weight on its int8 grid and its input's
fake quantizer, so that the folder computes what the checkpoint was measured with. The bounds of all sites that no
packed layer quantizes itself go into the folder too, and the loader decides whether to use them.

Left out: dense int8 kernels, padding a weight up to a kernel's smallest shape, and making embeddings smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sqat.checkpoint.manifest import LAYOUT, SIDE_FILES, LayerRecord
from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.export.packed_folder import FOLDER, TYPES, PackedLayer, SparseManifest, folder_files
from sqat.quantization.fake_quant import HIGH, fake_quantize_weight, quantize_weight
from sqat.sparsity.semi_structured import SHAPE_MULTIPLES, SemiStructured, pack, unsupported_reason


def write_packed(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Write a pruned checkpoint as a folder of packed weights.

    Args:
        checkpoint: with weights; its manifest names every linear of the model.

    Returns:
        Contents by name, each beginning with ``semi-structured/``.

    Raises:
        SqatError: not one layer can be packed.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()}
    weights: dict[str, SemiStructured] = {}
    dense: dict[str, str] = {}
    for name, record in checkpoint.manifest.layers.items():
        packed = pack_layer(checkpoint, name, record)
        weight = tensors.pop(f"{name}.weight", None)
        if isinstance(packed, SemiStructured):
            weights[name] = packed
            tensors |= {f"{name}.values": packed.values, f"{name}.metadata": packed.metadata}
            tensors |= scales_of(checkpoint, name, record)
            continue
        dense[name] = packed
        if weight is not None:
            tensors[f"{name}.weight"] = fake_quantize_weight(weight, None) if record.quantized else weight
    if not weights:
        first = next((f": {name}: {reason}" for name, reason in dense.items()), "")
        raise SqatError(f"target torch-semi-structured found no layer it can pack{first}", "prune to 2:4 before")
    known = checkpoint.manifest
    layers = {name: describe(weight, known.layers[name].pattern) for name, weight in weights.items()}
    sites = kept_sites(checkpoint, layers)
    tensors |= {f"{leader}.amax": checkpoint.amax[leader].detach().cpu().float() for leader in sites.values()}
    manifest = SparseManifest(key=known.key, base_model=known.base_model, versions=known.versions, layers=layers,
                              dense=dense, sites=sites, bytes=sizes(weights))  # fmt: skip
    known_files = checkpoint.files.items()
    others = {name: content for name, content in known_files if Path(name).suffix in SIDE_FILES and name != LAYOUT}
    return {f"{FOLDER}/{name}": content for name, content in folder_files(manifest, tensors, others).items()}


def pack_layer(checkpoint: Checkpoint, name: str, record: LayerRecord) -> SemiStructured | str:
    """A layer's packed weight, zeros +0.0, in CUTLASS' order where its shape allows; or why it stays dense."""
    weight = checkpoint.weights.get(f"{name}.weight")
    if weight is None:
        return "its weight is kept under another layer's name"
    if not record.pattern:
        return record.dense_because or "not pruned"
    if record.quantized and f"{name}:input" not in checkpoint.manifest.sites:
        return "its input has no scale: it was not seen in calibration"
    stored = quantize_weight(weight.cpu())[0] if record.quantized else weight.detach().cpu().half() + 0.0
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


def scales_of(checkpoint: Checkpoint, name: str, record: LayerRecord) -> dict[str, Tensor]:
    """Both scales of an int8 layer by their names in the file; none of another."""
    if not record.quantized:
        return {}
    amax = checkpoint.amax[checkpoint.manifest.sites[f"{name}:input"].shared_with]
    scale = quantize_weight(checkpoint.weights[f"{name}.weight"].cpu())[1]
    return {f"{name}.weight_scale": scale.float(), f"{name}.input_scale": amax.detach().cpu().float() / HIGH}


def describe(weight: SemiStructured, pattern: str) -> PackedLayer:
    """A layer's entry in `sparse.json`."""
    kind = next(name for name, dtype in TYPES.items() if dtype == weight.values.dtype)
    able = [
        backend for backend in SHAPE_MULTIPLES if not unsupported_reason(backend, weight.shape, weight.values.dtype)
    ]
    return PackedLayer(type=kind, shape=weight.shape, pattern=pattern, order=weight.order,
                       backends=(*able, "reference"))  # fmt: skip


def kept_sites(checkpoint: Checkpoint, layers: Mapping[str, PackedLayer]) -> dict[str, str]:
    """Site -> leader, of the sites that no packed layer quantizes itself."""
    own = {f"{name}:input" for name, layer in layers.items() if layer.type == "int8"}
    return {site: record.shared_with for site, record in checkpoint.manifest.sites.items() if site not in own}


def sizes(weights: Mapping[str, SemiStructured]) -> dict[str, int]:
    """Bytes of the packed layers' weights as they are packed, and as they would be dense in other types."""
    count = sum(rows * columns for rows, columns in (weight.shape for weight in weights.values()))
    packed = sum(weight.bytes for weight in weights.values())
    return {"packed": packed, "int8": count, "float16": 2 * count, "float32": 4 * count}
