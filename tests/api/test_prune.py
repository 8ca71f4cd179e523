"""`sqat.prune`, `sqat.masked` and `sqat.Pruner` in a training loop: masks hold and the model is given back."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

import sqat
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.schedules.per_group import PerGroup
from tests.api.conftest import Batches, assert_pruned, copy_state, copy_weights, train
from tests.errors import raises_code


def test_prune_keeps_the_largest_two_of_four(model: Any) -> None:
    before = copy_state(model)
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


def test_globs_choose_layers_and_the_others_have_a_reason(model: Any) -> None:
    masks = sqat.prune(model, "1:4", include=["*.attention.*"], exclude=["*.layer.1.*"])
    assert all(".layer.0.attention." in name for name in masks.kept)
    assert len(masks.kept) == 4
    assert masks.skipped["bert.encoder.layer.1.attention.self.query"] == "excluded"
    with pytest.raises(sqat.SqatError, match="matches no layer"):
        sqat.prune(model, include=["*.nothing"])
    with raises_code("usage"):
        sqat.prune(model, include="bert.encoder*")


def test_criteria_with_statistics_choose_other_weights_and_need_batches(model: Any, batches: Batches) -> None:
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


@pytest.mark.parametrize("reader", ["wanda", "taylor", "calibrate"])
def test_batches_are_read_one_at_a_time_and_the_users_random_numbers_stay(
    model: Any, batches: Batches, reader: Any
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
    if reader == "calibrate":
        sqat.calibrate(model, Drawn())
    else:
        sqat.prune(model, criterion=reader, batches=Drawn())
    assert torch.equal(torch.get_rng_state(), before)
    assert seen[0] == 0
    assert all(earlier < later for earlier, later in itertools.pairwise(seen)), "each is used before the next is drawn"


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, orthogonal])
def test_other_parametrizations_are_the_models_own(
    model: Any, batches: Batches, parametrize: Callable[[nn.Module], object], tmp_path: Path
) -> None:
    parametrize(model.bert.pooler.dense)
    parametrize(model.bert.encoder.layer[1].output.dense)
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches)
    own = {"bert.pooler.dense", "bert.encoder.layer.1.output.dense"}
    assert not own & {*masks.kept, *scales.layers}
    assert "computed by the model" in masks.skipped["bert.encoder.layer.1.output.dense"]
    assert len(masks.kept) == len(scales.layers) == 11
    with sqat.quantized(model, masks, scales):
        train(model, batches)
        with raises_code("usage"):
            sqat.prune(model)
    assert all(is_parametrized(model.get_submodule(name)) for name in own)
    if parametrize is weight_norm:  # one file is enough
        assert sqat.export_onnx(model, tmp_path / "model.onnx", batches[0], masks, scales) < 0.05


def test_too_few_steps_for_the_schedule_are_a_warning(model: Any) -> None:
    four = PerGroup(num_masks=4)
    with pytest.warns(UserWarning, match="^too few steps before the last mask: 2 of 4 masks are skipped$"):
        sqat.Pruner(model, steps=5, schedule=four).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqat.Pruner(model, steps=15, schedule=four).remove()


def test_a_function_is_a_criterion(model: Any) -> None:
    """The smallest stay: the very weights that magnitude prunes."""
    usual = sqat.prune(copy.deepcopy(model)).kept
    other = sqat.prune(model, criterion=lambda weight: -weight.abs())
    assert_pruned(model, other)
    assert all(torch.equal(other.kept[name], ~mask) for name, mask in usual.items())
    with raises_code("unsupported-model"):
        sqat.prune(copy.deepcopy(model), criterion=lambda weight: weight.abs().sum(1))


def test_taylor_takes_a_users_loss(model: Any, batches: Batches) -> None:
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
    before = copy_weights(model, masks)
    with sqat.masked(model, masks):
        train(model, batches, optimizer=optimizer)
        assert all(int((model.get_submodule(n).weight[~m] != 0).sum()) == 0 for n, m in masks.kept.items())
    assert_pruned(model, masks)
    assert all(not torch.equal(old, model.get_submodule(name).weight) for name, old in before.items())


def test_a_pruner_follows_its_schedule(model: Any, batches: Batches) -> None:
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


def test_a_pruner_that_stops_early_raises_and_cleans_up(model: Any) -> None:
    early = raises_code("usage")
    with early, sqat.Pruner(model, steps=8, recovery_fraction=0.5) as pruner:
        pruner.step()
    with pytest.raises(KeyError, match="the user's own"), sqat.Pruner(model, steps=8):
        raise KeyError("the user's own")
    assert_pruned(model, sqat.prune(model))


def test_permuted_channels_keep_more_of_the_same_model(model: Any, batches: Batches) -> None:
    with raises_code("no-rows"):
        sqat.prune(copy.deepcopy(model), permute=True)
    kept = {}
    for permute in (False, True):
        pruned = copy.deepcopy(model)
        masks = sqat.prune(pruned, batches=batches, permute=permute)
        assert_pruned(pruned, masks)
        kept[permute] = sum(float(weight.abs().sum()) for weight in copy_weights(pruned, masks).values())
        assert bool(masks.notes) == permute
    assert kept[True] > kept[False]
    assert masks.notes[0].startswith("permuted the channels of 4 groups")
    teacher, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = model(**batches[0]).logits.detach()
    with sqat.Pruner(
        model, len(batches), "2:4", "wanda", recovery_fraction=0.5, batches=batches, permute=True
    ) as pruner:
        assert torch.allclose(model(**batches[0]).logits, expected, atol=1e-4), "nothing is pruned yet"
        with sqat.distillation_loss(model, teacher) as minilm:
            model(**batches[0])
            assert abs(minilm(batches[0]).item()) < 1e-5
        for batch in batches:
            pruner.step()
            train(model, [batch], optimizer=optimizer)
    assert pruner.notes[0].endswith("wanda scores")
    assert_pruned(model, pruner.masks)
