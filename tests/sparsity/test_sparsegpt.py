"""SparseGPT against a loop that inverts what is left of the Hessian at every column, and against what it beats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sqat.sparsity.columns import from_columns, to_columns
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.criteria.sparsegpt import SparseGPT, damp, factor_inverse, refit, sweep
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules import Schedule
from sqat.sparsity.schedules.group_fraction import GroupFraction
from sqat.sparsity.schedules.per_group import PerGroup

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8), Pattern(2, 3)]


def activations(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs as they are in networks: correlated, of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return mixed * torch.randn(inputs, generator=generator).exp() + torch.randn(rows, inputs, generator=generator)


def weights(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def loop(weight: Tensor, gram: Tensor, damping: float, m: int, kept: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Row by row, column by column: an explicit inverse of the Hessian of the columns that are left, each time."""
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    result, mask = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            if i % m == 0:
                group = range(i, i + m)
                costs = {j: float(result[row, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in group}
                ranked = sorted(group, key=lambda j: (-costs[j], j))
                mask[row, ranked[: kept[row][i // m]]] = True
            if mask[row, i]:
                continue
            inverse = torch.linalg.inv(hessian[i:, i:])
            result[row, i:] -= result[row, i] / inverse[0, 0] * inverse[0]
    return mask, result * mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block", [1, 8, 128])
def test_the_sweep_is_the_loop(pattern: Pattern, block: int) -> None:
    weight, x = weights(5, 24).double(), activations(40, 24).double()
    counts = torch.full((5, 24 // pattern.m), pattern.n, dtype=torch.uint8)
    counts[0, 0] += 1  # a group that the schedule left one more
    factor = factor_inverse(damp(x.T @ x, 0.01), 0.01)
    mask, swept = sweep(weight, factor, pattern.m, counts, torch.ones_like(weight, dtype=torch.bool), block)
    wanted_mask, wanted = loop(weight, x.T @ x, 0.01, pattern.m, counts.tolist())
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(swept, wanted, rtol=1e-9, atol=1e-9)


def test_the_factor_holds_the_inverses_of_the_remaining_hessians() -> None:
    x = activations(30, 8).double()
    gram = x.T @ x
    factor = factor_inverse(damp(gram, 0.05), 0.05)
    hessian = gram + 0.05 * gram.diagonal().mean() * torch.eye(8, dtype=torch.double)
    assert not factor.tril(-1).any()
    for j in range(8):
        torch.testing.assert_close(factor[j, j:] * factor[j, j], torch.linalg.inv(hessian[j:, j:])[0])


def prune(weight: Tensor, x: Tensor, pattern: Pattern = PATTERNS[0], **knobs: Any) -> tuple[Tensor, Tensor]:
    return prune_by(PerGroup(num_masks=1), weight, x, pattern, torch.ones_like(weight, dtype=torch.bool), **knobs)


def prune_by(
    schedule: Schedule,
    weight: Tensor,
    x: Tensor,
    pattern: Pattern,
    previous: Tensor,
    sparsity: float = 0.0,
    **knobs: Any,
) -> tuple[Tensor, Tensor]:
    """The mask of a schedule's sparsity (the last by default), and the weight."""

    def choose(scores: Tensor) -> Tensor:
        return schedule.choose_mask(scores, pattern, sparsity or pattern.sparsity, previous)

    return SparseGPT(**knobs).prune(weight, x.T @ x, previous, pattern, choose, schedule.regrow)


def output_error(x: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((x @ (weight - pruned).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_outputs_are_nearer_than_by_magnitude_or_wanda(pattern: Pattern) -> None:
    weight, seen, unseen = weights(48, 64), *activations(2048, 64).split(1024)
    mask, swept = prune(weight, seen, pattern)
    assert torch.equal(swept != 0, mask)
    assert count_violations(mask, pattern) == 0
    by_wanda = weight * nm_mask(Wanda().score(weight, seen.square().sum(0)), pattern)
    by_magnitude = weight * nm_mask(Magnitude().score(weight), pattern)
    errors = [output_error(unseen, weight, pruned) for pruned in (swept, by_wanda, by_magnitude)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[1] < errors[2]


def test_both_the_choice_and_the_correction_help() -> None:
    weight, x = weights(48, 64), activations(1024, 64)
    mask, swept = prune(weight, x)
    assert output_error(x, weight, swept) < 0.9 * output_error(x, weight, weight * mask)
    factor = factor_inverse(damp((x.T @ x).double(), 0.01), 0.01)
    by_magnitude = nm_mask(weight.abs(), Pattern(2, 4))
    corrected = weight.double().clone()
    for i in range(64):  # the same correction for masks that magnitude chose
        error = corrected[:, i].masked_fill(by_magnitude[:, i], 0.0) / factor[i, i]
        corrected -= error[:, None] * factor[i]
    assert output_error(x, weight, swept) < output_error(x, weight, (corrected * by_magnitude).float())


def test_the_refit_is_least_squares_of_each_row() -> None:
    """By numpy, row by row: the dense output from the columns that stay, and a pull of the damping to the weight."""
    weight, x = weights(6, 24).double(), activations(60, 24).double()
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0], mask[1] = False, True
    hessian = damp(x.T @ x, 0.01)
    found = refit(weight, mask, torch.zeros_like(weight), hessian, tolerance=1e-9)
    pull = np.sqrt(float(0.01 * (x.T @ x).diagonal().mean())) * np.eye(24)
    for row, kept in enumerate(mask.numpy()):
        stacked = np.concatenate([x.numpy()[:, kept], pull[:, kept]])
        wanted = np.concatenate([x.numpy() @ weight[row].numpy(), pull @ weight[row].numpy()])
        np.testing.assert_allclose(found[row].numpy()[kept], np.linalg.lstsq(stacked, wanted)[0], rtol=1e-5, atol=1e-6)
        assert not found[row][~mask[row]].any()


def test_a_refit_lowers_the_error_of_the_layer_on_unseen_inputs_too() -> None:
    weight, seen, unseen = weights(48, 64), *activations(2048, 64).split(1024)
    mask, swept = prune(weight, seen, refit=False)
    same_mask, refitted = prune(weight, seen, refit=True)
    assert torch.equal(mask, same_mask)
    for x in (seen, unseen):
        assert output_error(x, weight, refitted) < 0.95 * output_error(x, weight, swept)


def test_a_refit_keeps_what_is_best_already() -> None:
    weight, hessian = weights(4, 16), damp(activations(40, 16).T @ activations(40, 16), 0.01)
    everything = torch.ones(4, 16, dtype=torch.bool)
    assert torch.equal(refit(weight, everything, weight, hessian), weight)


def test_alike_independent_inputs_make_it_magnitude() -> None:
    weight, x = weights(6, 16), 3 * torch.eye(16)
    mask, swept = prune(weight, x)
    assert torch.equal(mask, nm_mask(weight.abs(), Pattern(2, 4)))
    torch.testing.assert_close(swept, weight * mask)
    mask, swept = prune(weight, torch.zeros(4, 16))
    assert torch.equal(swept, weight * nm_mask(weight.abs(), Pattern(2, 4))), "dead inputs say nothing"


@pytest.mark.parametrize("kind", [PerGroup, GroupFraction])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_schedule_says_how_many_and_the_sweep_which(kind: type[PerGroup | GroupFraction], steps: int) -> None:
    weight, x, pattern = weights(8, 32), activations(128, 32), Pattern(2, 4)
    schedule, previous = kind(num_masks=steps), torch.ones(8, 32, dtype=torch.bool)
    for sparsity in schedule.sparsities(pattern):
        wanted = schedule.choose_mask(weight.abs(), pattern, sparsity, previous)
        mask, weight = prune_by(schedule, weight, x, pattern, previous, sparsity)
        assert int((~mask).sum()) == int((~wanted).sum()), "as many zeros as the schedule asks for"
        assert not (mask & ~previous).any(), "what is pruned stays pruned"
        assert not weight[~mask].any()
        previous = mask
    assert (previous.view(-1, 4).sum(1) == 2).all()


def test_a_pruned_weight_may_return_where_the_schedule_regrows() -> None:
    weight, x, pattern = weights(8, 32), activations(128, 32), Pattern(2, 4)
    previous = nm_mask(-weight.abs(), Pattern(3, 4))  # the worst there is: the largest of each group is gone
    mask, swept = prune_by(PerGroup(num_masks=1, regrow=True), weight, x, pattern, previous)
    assert (mask & ~previous).any()
    assert count_violations(swept, pattern) == 0


def test_a_convolution_is_swept_as_its_unfolded_matrix() -> None:
    weight = weights(8, 8 * 9).view(8, 8, 3, 3)
    x = activations(200, 72)
    mask, swept = prune(weight, x)
    flat = to_columns(weight).clone()
    wanted_mask, wanted = prune(flat, x)
    assert torch.equal(to_columns(mask), wanted_mask)
    assert torch.equal(to_columns(swept), wanted)
    assert count_violations(mask, Pattern(2, 4)) == 0
    assert torch.equal(from_columns(flat, weight.shape), weight)


@pytest.mark.parametrize("knobs", [{"samples": 0}, {"damping": 0.0}, {"damping": float("nan")}, {"damping": -1.0}])
def test_bad_knobs_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(knobs))} must be"):
        SparseGPT(**knobs)


def test_a_singular_hessian_is_an_error() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"X'X of 8 inputs has no inverse with damping 1e-30"):
        prune(weights(4, 8), x, damping=1e-30)
