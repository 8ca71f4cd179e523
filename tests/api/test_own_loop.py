"""`sqat.api` in a loop of one's own: what is changed is changed back, masks hold, and own functions count."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import sqat
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relations import QKV
from sqat.errors import ErrorCode
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.fake_quant import quantize_weight
from sqat.quantization.histogram import Histogram
from sqat.runtime.sessions import session
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.sparsity.schedules.sr_ste import SrSte
from tests.errors import raises_code
from tests.tiny import VOCABULARY, MakeModel

Batches = list[dict[str, Tensor]]


@pytest.fixture
def model(make_model: MakeModel) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def batches() -> Batches:
    """Four batches with labels and padding."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(4):
        ids = torch.randint(5, len(VOCABULARY), (4, 8), generator=draw)
        mask = (torch.arange(8) < torch.tensor([8, 6, 8, 3])[:, None]).long()
        labels = torch.randint(0, 2, (4,), generator=draw)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def weights(model: nn.Module, masks: sqat.Masks) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in masks.kept}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_pruned(model: nn.Module, masks: sqat.Masks) -> None:
    """Plain parameters, 2:4 as counted by hand, pruned weights +0.0."""
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    for name, mask in masks.kept.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        assert bool((weight.detach().reshape(-1, 4).count_nonzero(1) <= 2).all())
        assert bool((weight[~mask].signbit() == 0).all())
        assert int((weight[~mask] != 0).sum()) == 0


def train(model: nn.Module, batches: Batches, more: Callable[..., Tensor] | None = None, optimizer: Any = None) -> None:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for batch in batches:
        loss = model(**batch).loss + (0 if more is None else more(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_prune_keeps_the_largest_two_of_four(model: Any) -> None:
    before = state(model)
    masks = sqat.prune(model, pattern="2:4", criterion="magnitude")
    assert_pruned(model, masks)
    assert len(masks.kept) == 12
    assert set(masks.patterns.values()) == {"2:4"}
    assert "classifier" in masks.skipped
    name = "bert.encoder.layer.0.attention.self.query"
    for before_4, after_4 in zip(before[f"{name}.weight"].reshape(-1, 4).tolist(),
                                 model.get_submodule(name).weight.reshape(-1, 4).tolist(), strict=True):  # fmt: skip
        largest = sorted(range(4), key=lambda i: -abs(before_4[i]))[:2]
        assert after_4 == [before_4[i] if i in largest else 0.0 for i in range(4)]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before if "classifier" in key)


def test_globs_choose_layers_and_say_which_were_left(model: Any) -> None:
    masks = sqat.prune(model, "1:4", include=["*.attention.*"], exclude=["*.layer.1.*"])
    assert all(".layer.0.attention." in name for name in masks.kept)
    assert len(masks.kept) == 4
    assert masks.skipped["bert.encoder.layer.1.attention.self.query"] == "excluded by the recipe"
    with pytest.raises(sqat.SqatError, match="matches no layer"):
        sqat.prune(model, include=["*.nothing"])


def test_observing_criteria_choose_other_weights_and_need_batches(model: Any, batches: Batches) -> None:
    found = {}
    for criterion in ("magnitude", "wanda", "taylor", "sparsegpt"):
        network = copy.deepcopy(model)
        masks = sqat.prune(network, criterion=criterion, batches=batches)  # type: ignore[arg-type]
        assert_pruned(network, masks)
        found[criterion] = torch.cat([mask.flatten() for mask in masks.kept.values()])
    for criterion in ("wanda", "taylor", "sparsegpt"):
        assert not torch.equal(found[criterion], found["magnitude"])
        with raises_code("no-rows"):
            sqat.prune(copy.deepcopy(model), criterion=criterion)  # type: ignore[arg-type]
    plain = copy.deepcopy(model)
    with raises_code("usage"):
        sqat.prune(plain, criterion=Wanda(), batches=iter(batches))
    sqat.prune(plain)  # the refusals left it as it was


@pytest.mark.parametrize("observe", ["wanda", "taylor", "calibrate"])
def test_observing_draws_a_batch_at_a_time_and_no_random_number_of_the_users(
    model: Any, batches: Batches, observe: Any
) -> None:
    passes, seen = [0], list[int]()
    model.register_forward_hook(lambda *_: passes.append(0))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    class Drawn:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            order = iter(loader)
            for batch in order:
                seen.append(len(passes) - 1)
                yield batch

    before = torch.get_rng_state()
    if observe == "calibrate":
        sqat.calibrate(model, Drawn())
    else:
        sqat.prune(model, criterion=observe, batches=Drawn())
    assert torch.equal(torch.get_rng_state(), before)
    assert seen[0] == 0
    assert all(earlier < later for earlier, later in itertools.pairwise(seen)), "each is used before the next is drawn"


def test_too_few_steps_for_the_schedule_are_told(model: Any) -> None:
    four = PerGroup(num_masks=4)
    with pytest.warns(UserWarning, match="^too few steps before the last mask: 2 of 4 masks are skipped$"):
        sqat.Pruner(model, steps=5, schedule=four).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqat.Pruner(model, steps=15, schedule=four).remove()


def test_a_criterion_of_ones_own(model: Any) -> None:
    """The smallest stay: the very weights that magnitude prunes."""
    usual = sqat.prune(copy.deepcopy(model)).kept
    other = sqat.prune(model, criterion=lambda weight: -weight.abs())
    assert_pruned(model, other)
    assert all(torch.equal(other.kept[name], ~mask) for name, mask in usual.items())
    with raises_code("unsupported-model"):
        sqat.prune(copy.deepcopy(model), criterion=lambda weight: weight.abs().sum(1))


def test_taylor_takes_a_loss_of_ones_own(model: Any, batches: Batches) -> None:
    usual = sqat.prune(copy.deepcopy(model), criterion="taylor", batches=batches).kept
    other = sqat.prune(copy.deepcopy(model), criterion="taylor", batches=batches,
                       loss=lambda network, batch: network(**batch).logits[:, 0].sum()).kept  # fmt: skip
    same = sqat.prune(model, criterion="taylor", batches=batches,
                      loss=lambda network, batch: network(**batch).loss).kept  # fmt: skip
    assert any(not torch.equal(other[name], mask) for name, mask in usual.items())
    assert all(torch.equal(same[name], mask) for name, mask in usual.items())
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    with raises_code("usage"):
        sqat.prune(model, criterion="taylor", batches=unlabelled)


@pytest.mark.parametrize("made_before", [True, False])
def test_masks_hold_while_an_optimizer_with_momentum_and_decay_steps(
    model: Any, batches: Batches, made_before: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) if made_before else None
    if optimizer is not None:
        train(model, batches[:1], optimizer=optimizer)  # so that it has momentum on what will be pruned
    masks = sqat.prune(model)
    before = weights(model, masks)
    with sqat.masked(model, masks):
        train(model, batches, optimizer=optimizer)
        assert all(int((model.get_submodule(n).weight[~m] != 0).sum()) == 0 for n, m in masks.kept.items())
    assert_pruned(model, masks)
    assert all(not torch.equal(old, model.get_submodule(name).weight) for name, old in before.items())


def test_a_pruner_goes_through_its_schedule(model: Any, batches: Batches) -> None:
    zeros = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with sqat.Pruner(model, steps=8, recovery_fraction=0.5) as pruner:
        for step in range(8):
            pruner.step()
            train(model, [batches[step % 4]], optimizer=optimizer)
            mask = next(iter(pruner.masks.kept.values()))
            zeros.append(float((~mask).float().mean()))
            assert pruner.done == (step >= 4)
    assert zeros == [0.25] * 4 + [0.5] * 4
    assert_pruned(model, pruner.masks)
    assert pruner.finish().patterns == pruner.masks.patterns  # a second time


def test_a_pruner_that_stops_early_says_so_and_cleans_up(model: Any) -> None:
    early = raises_code("usage")
    with early, sqat.Pruner(model, steps=8, recovery_fraction=0.5) as pruner:
        pruner.step()
    with pytest.raises(KeyError, match="the user's own"), sqat.Pruner(model, steps=8):
        raise KeyError("the user's own")
    assert_pruned(model, sqat.prune(model))


def test_calibration_is_that_of_a_float64_quantile_and_leaves_the_model(model: Any, batches: Batches) -> None:
    model.train()
    before, attention = state(model), model.config._attn_implementation
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


def test_a_calibrator_of_ones_own(model: Any, batches: Batches) -> None:
    def half(histogram: Histogram) -> float:
        return histogram.max_abs / 2

    full, halved = (sqat.calibrate(model, batches, method=method).amax for method in ("max", half))
    assert {site: float(bound) for site, bound in halved.items()} == pytest.approx(
        {site: float(bound) / 2 for site, bound in full.items()}
    )
    with pytest.raises(ValueError, match=r"query:input: must be positive and finite, got -1"):
        sqat.calibrate(model, batches, method=lambda histogram: -1.0)


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_quantized_trains_straight_through_and_gives_the_model_back(
    model: Any, batches: Batches, placement: Any
) -> None:
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)
    with torch.no_grad():
        plain = model(**batches[0]).logits
        with sqat.quantized(model, masks, scales):
            rounded = model(**batches[0]).logits
        assert not torch.equal(plain, rounded)
        torch.testing.assert_close(rounded, plain, atol=0.2, rtol=0.1)
        torch.testing.assert_close(model(**batches[0]).logits, plain, atol=0, rtol=0)
    before = weights(model, masks)
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


class OwnPercentile(Percentile):
    def __call__(self, histogram: Histogram) -> float:
        return 1.0


class OwnWanda(Wanda):
    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        return weight


class OwnRelations(MiniLMv2):
    def __call__(self, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        return student.query.sum()


def test_subclasses_of_our_parts_run_their_own_code(model: Any, make_model: MakeModel, batches: Batches) -> None:
    assert {float(amax) for amax in sqat.calibrate(model, batches, method=OwnPercentile()).amax.values()} == {1.0}
    with sqat.distillation_loss(model, make_model().eval(), OwnRelations()) as loss:
        model(**batches[0])
        assert loss(batches[0]).isfinite()
    dense = copy.deepcopy(model)
    for name, mask in sqat.prune(model, criterion=OwnWanda(), batches=batches).kept.items():
        assert torch.equal(mask, nm_mask(dense.get_submodule(name).weight.detach(), parse_pattern("2:4")))


def test_what_does_not_fit_is_told_in_a_line(model: Any, make_model: MakeModel, batches: Batches) -> None:
    masks = sqat.prune(model)
    for wrong in (
        lambda: sqat.prune(model, criterion="magnitud"),  # type: ignore[arg-type]
        lambda: sqat.Pruner(model, 4, schedule="per-groups"),  # type: ignore[arg-type]
        lambda: sqat.calibrate(model, batches, method="percentil"),  # type: ignore[arg-type]
        lambda: sqat.calibrate(model, batches, placement="linea"),  # type: ignore[arg-type]
    ):
        with raises_code("unknown-name", "; did you mean '(magnitude|per-group|percentile|linear)'"):
            wrong()
    for schedule in (SrSte(), "sr-ste"):
        with raises_code("usage"):
            sqat.Pruner(model, 4, schedule=schedule)  # type: ignore[arg-type]
    with raises_code("usage"):
        sqat.prune(model, criterion=3)  # type: ignore[arg-type]
    with raises_code("usage"):
        sqat.calibrate(model, batches, method=None)  # type: ignore[arg-type]
    with raises_code("no-rows"):
        sqat.calibrate(model, [])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sqat.Pruner(model, 0)
    with pytest.raises(ValueError, match="recovery_fraction must lie in"):
        sqat.Pruner(model, 4, recovery_fraction=1.0)
    other = make_model("distilbert")
    with raises_code("model-mismatch"), sqat.masked(other, masks):
        pass
    with (
        raises_code("model-mismatch"),
        sqat.quantized(other, None, sqat.calibrate(model, batches)),
    ):
        pass
    with (
        raises_code("model-mismatch"),
        sqat.masked(make_model(hidden_size=48), masks),
    ):
        pass


def test_scales_of_other_sites_are_refused_before_anything_changes(model: Any, batches: Batches) -> None:
    scales = sqat.calibrate(model, batches, placement="tensorrt")
    before, attention = state(model), model.config._attn_implementation
    strange = replace(
        scales, shared_with={**scales.shared_with, "bert.encoder.layer.9:add0.left": next(iter(scales.amax))}
    )
    boundless = replace(scales, amax=dict(list(scales.amax.items())[1:]))
    for wrong in (strange, boundless):
        with (
            raises_code("model-mismatch"),
            sqat.quantized(model, sqat.prune(copy.deepcopy(model)), wrong),
        ):
            pytest.fail("inserted")
        with raises_code("model-mismatch"):
            sqat.export_onnx(model, "nowhere.onnx", batches[0], scales=wrong)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def relations(model: Any, batch: dict[str, Tensor]) -> QKV:
    """Q, k and v of the last block, without sqat."""
    layer = model.bert.encoder.layer[-1].attention.self
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-2]
        return QKV(layer.query(hidden), layer.key(hidden), layer.value(hidden), layer.num_attention_heads)


def test_the_distillation_loss_is_that_of_both_models_projections(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    sqat.prune(model)
    for network in (model, teacher):
        relations(network, batches[0])  # transformers puts hooks of its own on a model that is asked for hidden states
    before = hooks(model, teacher)
    with sqat.distillation_loss(model, teacher) as minilm:
        assert hooks(model, teacher) == before + 6
        model(**batches[0])
        loss = minilm(batches[0])
        wanted = MiniLMv2()(*(relations(network, batches[0]) for network in (model, teacher)),
                            batches[0]["attention_mask"])  # fmt: skip
        model(**batches[0])
        minilm(batches[0]).backward()
    torch.testing.assert_close(loss.detach(), wanted)
    assert float(loss.detach()) > 0.01
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert hooks(model, teacher) == before


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for network in models for module in network.modules())


def test_training_with_it_brings_the_student_nearer(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    masks = sqat.prune(model)
    with sqat.masked(model, masks), sqat.distillation_loss(model, teacher, "minilm-v1") as minilm:
        losses = []
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(8):
            model(**batches[0])
            loss = minilm(batches[0])
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_a_loss_of_ones_own(model: Any, batches: Batches) -> None:
    def values(student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        return (student.value - teacher.value).square()[attention_mask.bool()].mean()

    teacher = copy.deepcopy(model)
    sqat.prune(model)
    with sqat.distillation_loss(model, teacher, values) as distil:
        model(**batches[1])
        found = distil(batches[1])
        student, taught = (relations(network, batches[1]) for network in (model, teacher))
    real = batches[1]["attention_mask"].bool()
    torch.testing.assert_close(found.detach(), (student.value - taught.value)[real].square().mean())


def test_what_distillation_refuses(model: Any, make_model: MakeModel, batches: Batches) -> None:
    def refused(code: ErrorCode, *arguments: Any) -> None:
        with raises_code(code), sqat.distillation_loss(model, *arguments) as minilm:
            minilm(batches[0])

    teacher = make_model(num_attention_heads=4)
    refused("usage", teacher)  # the student has not seen the batch
    refused("unsupported-model", teacher, "minilm-v1")  # head counts differ
    refused("usage", model)
    refused("usage", copy.deepcopy(model).train())
    refused("unknown-name", teacher, "minilm-v3")
    assert hooks(model, teacher) == 0


def integers_of(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    return [numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("weight_int8")]


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_an_exported_file_is_the_quantized_model(
    make_model: MakeModel, batches: Batches, tmp_path: Path, placement: Any
) -> None:
    model = make_model(num_hidden_layers=1)
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)
    with sqat.quantized(model, masks, scales):
        train(model, batches)
    before = state(model)
    path = tmp_path / "model.onnx"
    difference = sqat.export_onnx(model, path, batches[0], masks, scales)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    integers = integers_of(path)
    assert len(integers) == 6
    wanted, _ = quantize_weight(model.bert.encoder.layer[0].attention.self.query.weight.detach())
    assert any(np.array_equal(found, wanted.numpy().T) for found in integers)
    assert all((found.T.reshape(-1, 4) != 0).sum(1).max() <= 2 for found in integers)
    inputs = {key: value.numpy() for key, value in batches[0].items() if key != "labels"}
    logits = session(path).run(None, inputs)[0]
    if placement != "cpu":  # whose bytes of the softmax only sqat.runtime has
        with torch.no_grad(), sqat.quantized(model, masks, scales):
            found = np.abs(logits - model(**batches[0]).logits.numpy()).max()
        assert difference == pytest.approx(found, abs=1e-2)
    assert difference < 0.05


def test_permuted_channels_keep_more_of_the_same_model(model: Any, batches: Batches) -> None:
    with raises_code("no-rows"):
        sqat.prune(copy.deepcopy(model), permute=True)
    kept = {}
    for permute in (False, True):
        pruned = copy.deepcopy(model)
        masks = sqat.prune(pruned, batches=batches, permute=permute)
        assert_pruned(pruned, masks)
        kept[permute] = sum(float(weight.abs().sum()) for weight in weights(pruned, masks).values())
        assert bool(masks.notes) == permute
    assert kept[True] > kept[False]
    assert masks.notes[0].startswith("permuted the channels of 4 groups")
    teacher, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    wanted = model(**batches[0]).logits.detach()
    with sqat.Pruner(
        model, len(batches), "2:4", "wanda", recovery_fraction=0.5, batches=batches, permute=True
    ) as pruner:
        assert torch.allclose(model(**batches[0]).logits, wanted, atol=1e-4), "nothing is pruned yet"
        with sqat.distillation_loss(model, teacher) as minilm:
            model(**batches[0])
            assert abs(minilm(batches[0]).item()) < 1e-5
        for batch in batches:
            pruner.step()
            train(model, [batch], optimizer=optimizer)
    assert pruner.notes[0].endswith("wanda scores")
    assert_pruned(model, pruner.masks)


def test_a_float_file_and_what_export_refuses(make_model: MakeModel, batches: Batches, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    assert sqat.export_onnx(model, tmp_path / "float.onnx", batches[0]) < 1e-4
    assert (tmp_path / "float.onnx").exists()
    refused = tmp_path / "refused.onnx"
    query = "bert.encoder.layer.0.attention.self.query"
    claimed = sqat.Masks({query: torch.ones(32, 32, dtype=torch.bool)}, {query: "2:4"}, {})
    with pytest.raises(sqat.GateError, match="breaks rule"):
        sqat.export_onnx(model, refused, batches[0], claimed)
    masks, scales = sqat.prune(model), sqat.calibrate(model, batches)
    wrong: list[tuple[ErrorCode, dict[str, Any]]] = [
        ("usage", {"scales": scales, "target": "onnx-fp32"}),
        ("usage", {"target": "onnx-int8"}),
        ("usage", {"scales": scales, "target": "tensorrt"}),
        ("unknown-name", {"scales": scales, "target": "onnx-int4"}),
    ]
    for code, more in wrong:
        with raises_code(code):
            sqat.export_onnx(model, refused, batches[0], masks, **more)
    train(model, batches)  # without the masks
    with raises_code("model-mismatch"):
        sqat.export_onnx(model, refused, batches[0], masks, scales)
    assert not refused.exists()


@pytest.mark.parametrize("name", sqat.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert (getattr(sqat, name).__doc__ or "").strip()
    assert name in dir(sqat)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        sqat.prnue  # type: ignore[attr-defined]  # noqa: B018
