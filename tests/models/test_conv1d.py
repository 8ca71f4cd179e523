"""GPT-2's Conv1D as linears while sqat works, and as they were in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sqat.checkpoint.manifest import LAYOUT, WEIGHTS
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.evaluation.inspection import inspect_checkpoint
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.compressed_tensors import write_compressed
from sqat.export.targets.semi_structured import write_packed
from sqat.models.attention import hook_last_qkv
from sqat.models.conv1d import to_conv1d_, to_linears_
from sqat.models.layer_selection import LinearOfConv1D, choose_layers, find_qkv
from sqat.models.loading import build, serialize_model
from sqat.modules.parametrize import get_layer
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern

MakeModel = Callable[..., PreTrainedModel]
LAST = "transformer.h.1"


@pytest.fixture
def linears(make_model: MakeModel) -> PreTrainedModel:
    model = make_model("gpt2")
    to_linears_(model)
    return model


@pytest.fixture
def pruned(linears: PreTrainedModel, make_checkpoint: Callable[..., Checkpoint], tokenizer: object) -> Checkpoint:
    """The linears pruned 2:4 and calibrated, as a stage hands them on."""
    encoder = make_checkpoint("bert")
    names = choose_layers(linears, Layers(), "prune").chosen
    masks = {name: nm_mask(get_layer(linears, name).weight.detach().abs(), parse_pattern("2:4")) for name in names}
    for name, mask in masks.items():
        get_layer(linears, name).weight.data = apply_mask(get_layer(linears, name).weight.detach(), mask)
    files, weights = serialize_model(linears, TextProcessor(tokenizer))
    record, site = (
        encoder.manifest.layers["bert.encoder.layer.1.output.dense"],
        next(iter(encoder.manifest.sites.values())),
    )
    sites = {f"{name}:input": site.model_copy(update={"shared_with": f"{name}:input"}) for name in names}
    manifest = encoder.manifest.model_copy(update={"layers": dict.fromkeys(names, record), "sites": sites})
    return Checkpoint(manifest, files, weights, masks, dict.fromkeys(sites, torch.tensor(2.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_computes_what_its_conv1d_does(
    dtype: torch.dtype, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model("gpt2").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(**batch).logits
        to_linears_(model)
        assert not any(isinstance(module, Conv1D) for module in model.modules())
        assert get_layer(model, f"{LAST}.attn.c_attn").weight.shape == (96, 32)
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=20 * torch.finfo(dtype).eps)
        to_conv1d_(model)
        assert torch.equal(model(**batch).logits, wanted)
    assert not any(isinstance(module, LinearOfConv1D) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_random_number_is_drawn(make_model: MakeModel) -> None:
    model, state = make_model("gpt2"), torch.get_rng_state()
    to_linears_(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_q_k_and_v_lie_side_by_side(linears: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    assert find_qkv(linears) == (f"{LAST}.attn.c_attn",)
    capture, seen = hook_last_qkv(linears), []
    handle = get_layer(linears, f"{LAST}.attn.c_attn").register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        linears(**batch)
    caught = capture.pop(3, 12)
    assert all(torch.equal(a, b) for a, b in zip(caught[:3], seen[0].split(32, -1), strict=True))
    assert caught.causal
    capture.remove()
    handle.remove()


def test_a_checkpoint_has_the_models_own_layout(pruned: Checkpoint, batch: dict[str, Tensor], tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "one")
    again = load_checkpoint(tmp_path / "one")
    save_checkpoint(again, tmp_path / "two")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert all(torch.equal(tensor, pruned.weights[name]) for name, tensor in again.weights.items())
    assert all(torch.equal(mask, pruned.masks[name]) for name, mask in again.masks.items())
    stored, name = load_file(tmp_path / "one" / WEIGHTS), f"{LAST}.mlp.c_fc"
    assert stored[f"{name}.weight"].shape == (32, 64)
    groups = (stored[f"{name}.weight"].unflatten(0, (8, 4)) != 0).sum(1)
    assert bool((groups == 2).all())
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, _ = build(again)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, model(**batch).logits, rtol=0, atol=2e-6)
        to_conv1d_(model)
        assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_inspect_reads_the_inputs_groups(pruned: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "one")
    rows = {row.name: row for row in inspect_checkpoint(tmp_path / "one")}
    assert rows[f"{LAST}.mlp.c_proj"].shape == (32, 64)
    assert rows[f"{LAST}.mlp.c_proj"].pattern == "2:4"
    assert rows["score"].pattern == "dense"


@pytest.mark.parametrize("content", [b"[]", b'{"transposed": ["no.such"]}', b'{"transposed": [1]}'])
def test_a_layout_of_another_model_is_told(content: bytes, pruned: Checkpoint, tmp_path: Path) -> None:
    wrong = replace(pruned, files={**pruned.files, LAYOUT: content})
    with pytest.raises(SqatError, match=r"layout\.json: does not name the linears of this model"):
        save_checkpoint(wrong, tmp_path / "one")


def test_a_broken_layout_is_told(pruned: Checkpoint, tmp_path: Path) -> None:
    wrong = replace(pruned, files={**pruned.files, LAYOUT: b"{"})
    with pytest.raises(SqatError, match=r"layout\.json: is not JSON"):
        save_checkpoint(wrong, tmp_path / "one")


def test_what_other_targets_make_of_it(pruned: Checkpoint, tmp_path: Path) -> None:
    assert json.loads(pruned.files[LAYOUT])["transposed"][0] == "transformer.h.0.attn.c_attn"
    with pytest.raises(SqatError, match="target compressed-tensors is for linears, and this"):
        write_compressed(pruned, quantize_model(pruned), tmp_path)
    write_packed(pruned, quantize_model(pruned), tmp_path / "packed")
    assert not (tmp_path / "packed" / LAYOUT).exists()


def test_an_encoder_has_no_layout(make_model: MakeModel, tokenizer: object) -> None:
    assert LAYOUT not in serialize_model(make_model("bert"), TextProcessor(tokenizer))[0]
