"""Schedules: masks grow, never lose N:M, and choose as a plain Python loop would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules import Schedule
from sqat.sparsity.schedules.group_fraction import GroupFraction
from sqat.sparsity.schedules.per_group import PerGroup

KINDS = [PerGroup, GroupFraction]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8), Pattern(2, 3)]


def random_scores(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 6, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(PATTERNS),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_masks_grow_to_exactly_n_of_m(kind, pattern, steps, rows, groups, seed):
    schedule: Schedule = kind(num_masks=steps)
    previous = None
    for step, sparsity in enumerate(schedule.sparsities(pattern)):
        scores = random_scores(seed + step, rows, groups * pattern.m)  # training moved the weights in between
        mask = schedule.choose_mask(scores, pattern, sparsity, previous)
        assert abs(int((~mask).sum()) - sparsity * mask.numel()) <= pattern.m  # group-fraction prunes whole groups
        if previous is not None:
            assert not (mask & ~previous).any(), "a pruned weight came back"
        previous = mask
    assert previous is not None
    assert (previous.view(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_shot_is_the_mask_itself(kind, pattern):
    scores = random_scores(0, 6, 24)
    schedule = kind(num_masks=1)
    (sparsity,) = schedule.sparsities(pattern)
    assert torch.equal(schedule.choose_mask(scores, pattern, sparsity, None), nm_mask(scores, pattern))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_per_group_takes_the_cheapest_next_weight(sparsity):
    scores = random_scores(3, 5, 16)
    groups = scores.view(-1, 4).tolist()
    total = round(sparsity * scores.numel())
    orders = [sorted(range(4), key=lambda i: (group[i], -i)) for group in groups]  # pruned first; ties: higher index
    zeros = [total // len(groups)] * len(groups)
    by_loss = sorted(range(len(groups)), key=lambda g: groups[g][orders[g][zeros[g]]])
    for g in by_loss[: total % len(groups)]:
        zeros[g] += 1
    expected = [[i not in orders[g][: zeros[g]] for i in range(4)] for g in range(len(groups))]
    assert PerGroup().choose_mask(scores, Pattern(2, 4), sparsity, None).view(-1, 4).tolist() == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_group_fraction_takes_the_cheapest_groups(sparsity):
    scores = random_scores(4, 5, 16)
    groups = scores.view(-1, 4).tolist()
    by_loss = sorted(range(len(groups)), key=lambda g: sum(sorted(groups[g])[:2]))
    chosen = by_loss[: round(len(groups) * sparsity / 0.5)]
    full = nm_mask(scores, Pattern(2, 4)).view(-1, 4).tolist()
    expected = [full[g] if g in chosen else [True] * 4 for g in range(len(groups))]
    assert GroupFraction().choose_mask(scores, Pattern(2, 4), sparsity, None).view(-1, 4).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_choosing_groups_beats_taking_them_in_order(kind):
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(5))
    pattern, sparsity = Pattern(2, 4), 0.125
    kept = (scores * kind().choose_mask(scores, pattern, sparsity, None)).sum()
    rows = 64 * 0.125 / (0.5 if kind is GroupFraction else 0.25)
    in_order = torch.ones_like(scores, dtype=torch.bool)
    in_order[: int(rows)] = nm_mask(scores[: int(rows)], pattern if kind is GroupFraction else Pattern(3, 4))
    assert in_order.sum() == kind().choose_mask(scores, pattern, sparsity, None).sum()
    assert kept > (scores * in_order).sum() * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_return_only_with_regrow(kind):
    pattern = Pattern(2, 4)
    before = nm_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), pattern)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert kind().choose_mask(scores, pattern, 0.5, before).tolist() == [[True, True, False, False]]
    assert kind(regrow=True).choose_mask(scores, pattern, 0.5, before).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_are_grouped_along_their_input(kind):
    scores = torch.rand(4, 8, 3, 3, generator=torch.Generator().manual_seed(6))
    schedule, previous = kind(num_masks=3), None
    for sparsity in schedule.sparsities(Pattern(2, 4)):
        previous = schedule.choose_mask(scores, Pattern(2, 4), sparsity, previous)
    assert previous is not None
    assert previous.shape == scores.shape
    assert count_violations(previous, Pattern(2, 4)) == 0
    assert torch.equal(previous, nm_mask(scores, Pattern(2, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_sparsities_are_even_or_as_given(kind):
    assert kind(num_masks=2).sparsities(Pattern(2, 4)) == (0.25, 0.5)
    assert kind(num_masks=5).sparsities(Pattern(1, 4)) == pytest.approx((0.15, 0.3, 0.45, 0.6, 0.75))
    assert kind(num_masks=(0.1, 0.3, 2 / 3)).sparsities(Pattern(1, 3))[-1] == Pattern(1, 3).sparsity
    with pytest.raises(ValueError, match=r"end at 0\.5, the sparsity of 2:4, got 0\.4"):
        kind(num_masks=(0.1, 0.4)).sparsities(Pattern(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "num_masks", [0, -1, (), (0.0, 0.5), (0.3, 0.3, 0.5), (0.5, 0.25), (0.5, 1.0), (float("nan"), 0.5)]
)
def test_bad_num_masks_are_refused(kind, num_masks):
    with pytest.raises(ValueError, match=r"^num_masks must be"):
        kind(num_masks=num_masks)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_calls_are_refused(kind):
    scores, pattern = torch.ones(2, 8), Pattern(2, 4)
    with pytest.raises(ValueError, match=r"sparsity 0\.6 is outside 0\.\.0\.5"):
        kind().choose_mask(scores, pattern, 0.6, None)
    with pytest.raises(ValueError, match=r"previous mask \(8,\) and scores \(2, 8\) differ"):
        kind().choose_mask(scores, pattern, 0.5, torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 of 16 scores are not finite"):
        kind().choose_mask(scores.masked_fill(torch.arange(16).view(2, 8) == 3, -torch.inf), pattern, 0.5, None)
