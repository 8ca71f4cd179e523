"""The compressed-tensors folder: it stores the checkpoint's own numbers, and every fault of a folder is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from sqat.checkpoint.manifest import SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.compressed_tensors import check_compressed, skipped_sites, write_compressed
from tests.errors import raises_code

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert")
MakeCheckpoint = Callable[..., Checkpoint]
LAYER = "bert.encoder.layer.1.output.dense"
FLOAT = "bert.encoder.layer.0.attention.self.query"


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the folder of a checkpoint."""
    write_compressed(checkpoint, quantize_model(checkpoint), folder)
    return folder


def patterns(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: record.pattern for name, record in checkpoint.manifest.layers.items() if record.pattern}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_is_stored_as_torch_quantizes_it(make_checkpoint: MakeCheckpoint, name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name)
    tensors = load_file(write(checkpoint, tmp_path) / "model.safetensors")
    quantized = [layer for layer, record in checkpoint.manifest.layers.items() if record.quantized]
    assert {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")} == set(quantized)
    for layer in quantized:
        weight, integers = checkpoint.weights[f"{layer}.weight"], tensors[f"{layer}.weight"]
        scale = weight.abs().amax(1) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
        assert torch.equal(integers * tensors[f"{layer}.weight_scale"], expected)
        assert not integers[~checkpoint.masks[layer]].any()
        assert torch.equal(tensors[f"{layer}.input_scale"] * 127, checkpoint.amax[f"{layer}:input"].reshape(1))
    rest = [key for key in tensors if key.removesuffix(".weight") not in quantized and "_scale" not in key]
    assert all(torch.equal(tensors[key], checkpoint.weights[key]) for key in rest)
    assert len(rest) + len(quantized) == len(checkpoint.weights)


def test_config_says_which_linears_stay_float(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    folder = write(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    before = json.loads(checkpoint.files["config.json"])
    found = config.pop("quantization_config")
    assert config == before
    assert found["ignore"] == [FLOAT, "bert.pooler.dense", "classifier"]
    assert "sparsity_config" not in found
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} == {
        path.name for path in folder.iterdir()
    }


def test_a_shared_quantizer_gives_its_scale_to_all_its_layers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    parts = [f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    leader = f"{parts[0]}:input"
    sites = {**checkpoint.manifest.sites, **{f"{p}:input": SiteRecord(shared_with=leader, saturated=0) for p in parts}}
    shared = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"sites": sites}))
    tensors = load_file(write(shared, tmp_path) / "model.safetensors")
    assert {float(tensors[f"{part}.input_scale"]) for part in parts} == {float(checkpoint.amax[leader] / 127)}


def test_sites_without_a_name_in_the_format_are_in_the_notes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    assert list(skipped_sites(checkpoint)) == []
    roles, shared = ("query", "key", "add0.left", "output"), next(iter(checkpoint.amax))
    more = {f"bert.encoder.layer.0:{role}": SiteRecord(shared_with=shared, saturated=None) for role in roles}
    manifest = checkpoint.manifest.model_copy(update={"sites": {**checkpoint.manifest.sites, **more}})
    extended = replace(checkpoint, manifest=manifest)
    folders = write(checkpoint, tmp_path / "one"), write(extended, tmp_path / "two")
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    assert [note.partition(" stay float")[0] for note in skipped_sites(extended)] == [
        "4 activation sites (2 attention product operands, 1 residual add, 1 linear output)"
    ]


def test_a_layer_without_an_input_scale_is_an_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    sites = {name: record for name, record in checkpoint.manifest.sites.items() if not name.startswith(LAYER)}
    with pytest.raises(SqatError, match=LAYER) as error:
        write(replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"sites": sites})), tmp_path)
    assert error.value.code == "unsupported-target"


def test_a_convolution_is_an_error_before_anything_is_written(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    name = f"{LAYER}.weight"
    weights = {**checkpoint.weights, name: checkpoint.weights[name][:, :, None, None]}
    masks = {layer: mask for layer, mask in checkpoint.masks.items() if layer != LAYER}
    with raises_code("unsupported-target", match=f"{LAYER} is a convolution"):
        write(replace(checkpoint, weights=weights, masks=masks), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_float_matrix_that_is_no_layer_is_ignored(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    router = {"experts.router.weight": torch.randn(2, 32), "experts.router.bias": torch.zeros(2)}
    folder = write(replace(checkpoint, weights={**checkpoint.weights, **router}), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"].count("experts.router") == 1
    assert check_compressed(folder, patterns(checkpoint)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_was_written_passes(make_checkpoint: MakeCheckpoint, name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name)
    assert check_compressed(write(checkpoint, tmp_path), patterns(checkpoint)) == []
    (tmp_path / "model.safetensors").unlink()
    assert check_compressed(tmp_path) == ["model.safetensors is missing"]


def group(config: dict[str, Any]) -> dict[str, Any]:
    """The scheme of the linears."""
    scheme: dict[str, Any] = config["config_groups"]["linears"]
    return scheme


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "has a sparsity_config": lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
    "has a kv_cache_scheme": lambda c: c.update(kv_cache_scheme={"num_bits": 8}),
    "format is 'float-quantized', must be 'int-quantized'": lambda c: c.update(format="float-quantized"),
    "quantization_status is None": lambda c: c.pop("quantization_status"),
    "linears.weights.strategy is 'tensor', must be 'channel'": lambda c: group(c)["weights"].update(strategy="tensor"),
    "linears.weights.symmetric is False": lambda c: group(c)["weights"].update(symmetric=False),
    "linears.input_activations.dynamic is True": lambda c: group(c)["input_activations"].update(dynamic=True),
    "linears.input_activations.num_bits is None": lambda c: group(c).update(input_activations=None),
    "linears.output_activations are quantized": lambda c: group(c).update(output_activations={"num_bits": 8}),
    "config_groups holds no group": lambda c: c.update(config_groups={}),
    "linears.weights.type is None": lambda c: c.update(config_groups={"linears": []}),
    f"{LAYER} is quantized and in the ignore list": lambda c: c["ignore"].append(LAYER),
    "classifier is a float linear and not in the ignore list": lambda c: c["ignore"].remove("classifier"),
    "elsewhere is in the ignore list and has no weight": lambda c: c["ignore"].append("elsewhere"),
}


@pytest.mark.parametrize("problem", CONFIGS)
def test_a_wrong_config_is_an_error(make_checkpoint: MakeCheckpoint, problem: str, tmp_path: Path) -> None:
    path = write(make_checkpoint("bert"), tmp_path) / "config.json"
    config = json.loads(path.read_text())
    CONFIGS[problem](config["quantization_config"])
    path.write_text(json.dumps(config))
    found = check_compressed(tmp_path)
    assert found
    assert any(problem in line for line in found)


Tensors = dict[str, torch.Tensor]
TENSORS: dict[str, Callable[[Tensors], object]] = {
    f"{LAYER}.weight is not an int8 matrix": lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float()}),
    f"{LAYER}.weight holds -128": lambda t: t[f"{LAYER}.weight"][0, 0].fill_(-128),
    f"{LAYER}.weight_scale is not a float tensor of shape [32, 1]": lambda t: t.update(
        {f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"][:, 0].clone()}
    ),
    f"{LAYER}.weight_scale is not positive and finite": lambda t: t[f"{LAYER}.weight_scale"][3].fill_(0),
    f"{LAYER}.input_scale is not a float tensor of shape [1]": lambda t: t.pop(f"{LAYER}.input_scale"),
    f"{LAYER}.input_scale is not positive and finite": lambda t: t[f"{LAYER}.input_scale"].fill_(torch.inf),
    f"{LAYER}.weight_zero_point: symmetric": lambda t: t.update({f"{LAYER}.weight_zero_point": torch.zeros(32, 1)}),
    f"{LAYER}.weight is said to be 2:4, but 1 groups hold more": lambda t: t[f"{LAYER}.weight"][0, :4].fill_(1),
    f"{FLOAT}.weight is said to be 2:4, but 8 groups hold more": lambda t: t[f"{FLOAT}.weight"][0].fill_(1.0),
    f"{FLOAT} is said to be 2:4 and has no weight": lambda t: t.pop(f"{FLOAT}.weight"),
    "no layer has a weight_scale": lambda t: [t.pop(name) for name in list(t) if name.endswith("weight_scale")],
}


@pytest.mark.parametrize("problem", TENSORS)
def test_wrong_tensors_are_errors(make_checkpoint: MakeCheckpoint, problem: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    path = write(checkpoint, tmp_path) / "model.safetensors"
    tensors = load(path.read_bytes())
    TENSORS[problem](tensors)
    path.write_bytes(save(tensors))
    found = check_compressed(tmp_path, patterns(checkpoint))
    assert any(line.startswith(problem) for line in found)


@pytest.mark.parametrize(("config", "told"), [
    (b"{", "config.json or model.safetensors cannot be read"),
    (b"[" * 100_000, "config.json or model.safetensors cannot be read: holds lists"),
    (b"[]", "config.json has no quantization_config"),
    (b'{"quantization_config": 1}', "config.json has no quantization_config"),
])  # fmt: skip
def test_a_folder_that_is_something_else(
    make_checkpoint: MakeCheckpoint, config: bytes, told: str, tmp_path: Path
) -> None:
    (write(make_checkpoint("bert"), tmp_path) / "config.json").write_bytes(config)
    found = check_compressed(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(told)
