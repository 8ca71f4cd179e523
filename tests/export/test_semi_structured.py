"""What the target torch-semi-structured writes, read with safetensors and torch's own conversion alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.semi_structured import write_packed
from sqat.quantization.fake_quant import quantize_weight
from tests.errors import raises_code

FIRST = "bert.encoder.layer.0.attention.self.query"  # left float in `make_checkpoint`
QUERY = "bert.encoder.layer.1.attention.self.query"  # [32, 32]
DOWN = "bert.encoder.layer.1.output.dense"  # [32, 64]
MakeCheckpoint = Callable[..., Checkpoint]


def write(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of the folder by name."""
    with TemporaryDirectory() as folder:
        write_packed(checkpoint, quantize_model(checkpoint), Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `sparse.json` and the tensor file hold."""
    files = write(checkpoint)
    return json.loads(files["sparse.json"]), load(files["sparse.safetensors"])


def by_bits(values: Tensor, metadata: Tensor) -> Tensor:
    """A packed weight in the order ``rows``, one group after another."""
    rows, kept = values.shape
    bits = 8 * metadata.element_size()
    dense = torch.zeros(rows, 2 * kept, dtype=values.dtype)
    for row in range(rows):
        word = sum((int(w) % 2**bits) << (bits * i) for i, w in enumerate(metadata[row]))
        for group in range(kept // 2):
            four = word >> (4 * group) & 15
            dense[row, 4 * group + (four & 3)] = values[row, 2 * group]
            dense[row, 4 * group + (four >> 2)] = values[row, 2 * group + 1]
    return dense


def with_weight(checkpoint: Checkpoint, name: str, weight: Tensor, **record: Any) -> Checkpoint:
    """The checkpoint with another weight in one layer, which need not keep to its mask."""
    layers = dict(checkpoint.manifest.layers)
    layers[name] = layers[name].model_copy(update=record)
    masks = {layer: mask for layer, mask in checkpoint.masks.items() if layer != name}
    weights = {**checkpoint.weights, f"{name}.weight": weight}
    manifest = checkpoint.manifest.model_copy(update={"layers": layers})
    return replace(checkpoint, manifest=manifest, masks=masks, weights=weights)


def test_int8_layers_hold_the_fake_quantizers_integers_and_scales(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    entries, tensors = read(checkpoint)
    for name, entry in entries["layers"].items():
        if entry["type"] != "int8":
            continue
        integers, scale = quantize_weight(checkpoint.weights[f"{name}.weight"])
        assert entry["order"] == "rows"
        assert torch.equal(by_bits(tensors[f"{name}.values"], tensors[f"{name}.metadata"]), integers)
        assert torch.equal(tensors[f"{name}.weight_scale"], scale)
        assert torch.equal(tensors[f"{name}.input_scale"], checkpoint.amax[f"{name}:input"] / 127)
        assert f"{name}.weight" not in tensors
    assert sum(entry["type"] == "int8" for entry in entries["layers"].values()) == 11


def test_a_pruned_float_layer_is_float16(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    entries, tensors = read(checkpoint)
    assert entries["layers"][FIRST] == {"type": "float16", "shape": [32, 32], "pattern": "2:4", "order": "rows",
                                        "backends": ["cusparselt", "reference"]}  # fmt: skip
    stored = by_bits(tensors[f"{FIRST}.values"], tensors[f"{FIRST}.metadata"])
    assert torch.equal(stored, checkpoint.weights[f"{FIRST}.weight"].half())
    assert f"{FIRST}.weight_scale" not in tensors


def test_the_rest_is_there_as_it_is_and_every_file_has_its_digest(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    files = write(checkpoint)
    entries, tensors = read(checkpoint)
    packed = {f"{name}.weight" for name in entries["layers"]}
    for name, tensor in checkpoint.weights.items():
        assert (name in tensors) == (name not in packed)
        assert name in packed or torch.equal(tensors[name], tensor)
    assert set(entries["dense"]) | set(entries["layers"]) == set(checkpoint.manifest.layers)
    assert entries["dense"]["classifier"] == "outside the encoder blocks (rule B8)"
    assert {*entries["files"], "sparse.json"} == set(files)
    assert {"config.json", "tokenizer.json", "sparse.safetensors"} <= set(entries["files"])
    for name, digest in entries["files"].items():
        assert sha256(files[name]).hexdigest() == digest
    assert write(checkpoint) == files, "the same every time"


def test_layers_that_cutlass_takes_are_stored_in_its_order(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    mask = torch.tensor([0.0, 1, 1, 0]).repeat(32, 32)
    wide = with_weight(checkpoint, DOWN, torch.randn(32, 128) * mask)
    wide = with_weight(wide, FIRST, torch.randn(32, 64) * mask[:, :64])
    entries, tensors = read(wide)
    for name, kind in ((DOWN, "int8"), (FIRST, "float16")):
        assert entries["layers"][name]["type"] == kind
        assert entries["layers"][name]["order"] == "cutlass"
        assert entries["layers"][name]["backends"] == ["cusparselt", "cutlass", "reference"]
        stored = sparse_semi_structured_to_dense_cutlass(tensors[f"{name}.values"], tensors[f"{name}.metadata"])
        weight = wide.weights[f"{name}.weight"]
        assert torch.equal(stored, quantize_weight(weight)[0] if kind == "int8" else weight.half())


def test_sizes_are_what_the_tensors_take(make_checkpoint: MakeCheckpoint) -> None:
    entries, tensors = read(make_checkpoint())
    packed = [name for name in tensors if name.endswith((".values", ".metadata"))]
    weights = sum(rows * columns for rows, columns in (entry["shape"] for entry in entries["layers"].values()))
    sizes = entries["bytes"]
    assert sizes["packed"] == sum(tensors[name].nbytes for name in packed)
    assert (sizes["int8"], sizes["float16"], sizes["float32"]) == (weights, 2 * weights, 4 * weights)
    one = tensors[f"{DOWN}.values"].nbytes + tensors[f"{DOWN}.metadata"].nbytes
    assert one == 0.625 * 32 * 64
    half = tensors[f"{FIRST}.values"].nbytes + tensors[f"{FIRST}.metadata"].nbytes
    assert half == 1.125 * 32 * 32


def test_zeros_are_plus_zero(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    weight = checkpoint.weights[f"{FIRST}.weight"].clone()
    weight[0] = torch.tensor([0, 0, -1e-9, 0]).repeat(8)  # -0.0 in float16
    weight[1] = 0
    _, tensors = read(with_weight(checkpoint, FIRST, weight))
    assert not tensors[f"{FIRST}.values"][:2].view(torch.int16).any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.randn(32, 48) * torch.tensor([1.0, 0, 0, 1] * 12)}, "[32, 48] is not a multiple of [32, 32]"),
        ({"weight": torch.randn(32, 32), "pattern": "4:8"}, "4:8 is not 2:4: "),
        ({"weight": torch.randn(32, 32), "pattern": "", "dense_because": "too dear to prune"}, "too dear to prune"),
    ],
)
def test_a_quantized_layer_that_stays_dense_says_why_and_keeps_its_quantizer(
    change: dict[str, Any], reason: str, make_checkpoint: MakeCheckpoint
) -> None:
    change = dict(change)
    checkpoint = with_weight(make_checkpoint(), QUERY, change.pop("weight"), **change)
    entries, tensors = read(checkpoint)
    assert reason in entries["dense"][QUERY]
    assert entries["sites"] == {f"{QUERY}:input": f"{QUERY}:input"}
    assert torch.equal(tensors[f"{QUERY}:input.amax"], checkpoint.amax[f"{QUERY}:input"])
    integers, scale = quantize_weight(checkpoint.weights[f"{QUERY}.weight"])
    torch.testing.assert_close(tensors[f"{QUERY}.weight"], integers * scale[:, None])


def test_a_layer_of_other_patterns_is_packed_if_it_is_2_4_all_the_same(make_checkpoint: MakeCheckpoint) -> None:
    weight = torch.randn(32, 32) * torch.tensor([1.0, 0, 0, 0]).repeat(8)
    entries, _ = read(with_weight(make_checkpoint(), QUERY, weight, pattern="1:4"))
    assert entries["layers"][QUERY]["pattern"] == "1:4"


def test_a_layer_without_input_scale_stays_dense(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    sites = {site: record for site, record in checkpoint.manifest.sites.items() if not site.startswith(QUERY)}
    lacking = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"sites": sites}))
    entries, _ = read(lacking)
    assert entries["dense"][QUERY] == "its input has no scale: it was not seen in calibration"


def test_a_weight_beyond_float16_stays_dense(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    weight = checkpoint.weights[f"{FIRST}.weight"].clone()
    weight[0, :4] = torch.tensor([7e4, 0, 0, 0])
    entries, tensors = read(with_weight(checkpoint, FIRST, weight))
    assert entries["dense"][FIRST] == "a weight is too large for float16"
    assert torch.equal(tensors[f"{FIRST}.weight"], weight)


def test_other_sites_go_along_with_their_amax(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    leader = f"{QUERY}:input"
    record = next(iter(checkpoint.manifest.sites.values()))
    sites = checkpoint.manifest.sites | {"a:add0.left": record.model_copy(update={"shared_with": leader})}
    more = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"sites": sites}))
    entries, tensors = read(more)
    assert entries["sites"] == {"a:add0.left": leader}, "inputs of int8 layers are quantized by the layers"
    assert {name for name in tensors if name.endswith(".amax")} == {f"{leader}.amax"}


def test_nothing_to_pack_is_one_line_of_error(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    layers = {
        name: record.model_copy(update={"pattern": "", "dense_because": "no prune stage"})
        for name, record in checkpoint.manifest.layers.items()
    }
    dense = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"layers": layers}), masks={})
    with pytest.raises(SqatError) as error:
        write(dense)
    assert error.value.code == "unsupported-target"
    bare = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"layers": {}}), masks={})
    with pytest.raises(SqatError) as error:
        write(bare)
    assert error.value.code == "unsupported-target"


def test_convolutions_stay_dense_and_alone_are_an_error(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    weight = checkpoint.weights[f"{QUERY}.weight"][:, :, None, None]
    entries, _ = read(with_weight(checkpoint, QUERY, weight))
    assert "convolution" in entries["dense"][QUERY]
    records = checkpoint.manifest.layers
    others = {name: record.model_copy(update={"pattern": ""}) for name, record in records.items() if name != QUERY}
    alone = checkpoint.manifest.model_copy(update={"layers": {QUERY: records[QUERY], **others}})
    with raises_code("unsupported-target", match="convolution.*leave it out"):
        write(with_weight(replace(checkpoint, manifest=alone), QUERY, weight))
