"""`sqat.calibrate` and `sqat.quantized` in a training loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import sqat
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.histogram import Histogram
from tests.api.conftest import Batches, assert_pruned, copy_state, copy_weights, train
from tests.errors import raises_code


def test_calibration_is_that_of_a_float64_quantile_and_leaves_the_model(model: Any, batches: Batches) -> None:
    model.train()
    before, attention = copy_state(model), model.config._attn_implementation
    scales = sqat.calibrate(model, iter(batches), method=Percentile(percentile=100), placement="tensorrt")
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "classifier" in scales.skipped
    site = "bert.encoder.layer.0.attention.self.query:input"
    seen = []
    handle = model.bert.embeddings.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    real = torch.cat([rows[batch["attention_mask"].bool()] for rows, batch in zip(seen, batches, strict=True)])
    assert float(scales.amax[scales.shared_with[site]]) == pytest.approx(float(real.abs().max()))


def test_a_function_is_a_calibrator(model: Any, batches: Batches) -> None:
    def half(histogram: Histogram) -> float:
        return histogram.max_abs / 2

    full, halved = (sqat.calibrate(model, batches, method=method).amax for method in ("max", half))
    assert {site: float(amax) for site, amax in halved.items()} == pytest.approx(
        {site: float(amax) / 2 for site, amax in full.items()}
    )
    with pytest.raises(ValueError, match=r"query:input: must be positive and finite, got -1"):
        sqat.calibrate(model, batches, method=lambda histogram: -1.0)


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_quantized_trains_and_gives_the_model_back(model: Any, batches: Batches, placement: Any) -> None:
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)
    with torch.no_grad():
        plain = model(**batches[0]).logits
        with sqat.quantized(model, masks, scales):
            rounded = model(**batches[0]).logits
        assert not torch.equal(plain, rounded)
        torch.testing.assert_close(rounded, plain, atol=0.2, rtol=0.1)
        torch.testing.assert_close(model(**batches[0]).logits, plain, atol=0, rtol=0)
    before = copy_weights(model, masks)
    with sqat.quantized(model, masks, scales):
        train(model, batches)
    assert_pruned(model, masks)
    assert all(not torch.equal(old, model.get_submodule(name).weight) for name, old in before.items())


def test_a_model_is_changed_once_at_a_time(model: Any, batches: Batches) -> None:
    masks, scales = sqat.prune(model), sqat.calibrate(model, batches)
    with sqat.quantized(model, masks, scales):
        for again in (sqat.masked(model, masks), sqat.quantized(model, None, scales)):
            with raises_code("usage"), again:
                pass
        with raises_code("usage"):
            sqat.export_onnx(model, "nowhere.onnx", batches[0])
    with pytest.raises(KeyError, match="the user's own"), sqat.quantized(model, masks, scales):
        raise KeyError("the user's own")
    assert_pruned(model, masks)


def test_scales_of_other_sites_are_refused_and_nothing_changes(model: Any, batches: Batches) -> None:
    scales = sqat.calibrate(model, batches, placement="tensorrt")
    before, attention = copy_state(model), model.config._attn_implementation
    unknown = replace(
        scales, shared_with={**scales.shared_with, "bert.encoder.layer.9:add0.left": next(iter(scales.amax))}
    )
    incomplete = replace(scales, amax=dict(list(scales.amax.items())[1:]))
    for wrong in (unknown, incomplete):
        with (
            raises_code("model-mismatch"),
            sqat.quantized(model, sqat.prune(copy.deepcopy(model)), wrong),
        ):
            pytest.fail("inserted")
        with raises_code("model-mismatch"):
            sqat.export_onnx(model, "nowhere.onnx", batches[0], scales=wrong)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
