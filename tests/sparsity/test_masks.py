"""N:M masks against enumeration of every pattern, and against a sort in plain Python."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.masks import apply_mask, count_violations, nm_mask, pack_bits, unpack_bits
from sqat.sparsity.pattern import Pattern, parse_pattern

PATTERNS = [Pattern(*p) for p in ((1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (1, 8), (3, 7), (5, 16), (16, 32))]


def best_by_enumeration(group: list[int], n: int) -> list[bool]:
    """Of all ways to keep n, the first one (lower indices first) with the largest sum."""
    best = max(combinations(range(len(group)), n), key=lambda kept: sum(group[i] for i in kept))
    return [i in best for i in range(len(group))]


@settings(deadline=None)
@given(st.data(), st.sampled_from([p for p in PATTERNS if p.m <= 8]), st.integers(1, 3), st.integers(1, 3))
def test_mask_is_the_best_of_all_patterns(data, pattern, rows, groups):
    count = rows * groups * pattern.m
    values = data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))  # few values: many ties
    scores = torch.tensor(values, dtype=torch.float32).view(rows, groups * pattern.m)
    expected = [best_by_enumeration(group, pattern.n) for group in scores.view(-1, pattern.m).tolist()]
    assert nm_mask(scores, pattern).view(-1, pattern.m).tolist() == expected


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mask_equals_a_stable_sort(pattern):
    scores = torch.randn(6, 3 * pattern.m, generator=torch.Generator().manual_seed(0)).mul(4).round()
    mask = nm_mask(scores, pattern)
    for group, kept in zip(scores.view(-1, pattern.m).tolist(), mask.view(-1, pattern.m).tolist(), strict=True):
        order = sorted(range(pattern.m), key=lambda i: -group[i])
        assert sorted(order[: pattern.n]) == [i for i, keep in enumerate(kept) if keep]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kept_magnitude_is_the_published_figure(dtype):
    np.random.seed(1)  # the published figure was drawn from numpy's global generator
    weight = torch.from_numpy(np.random.rand(128, 64)).to(dtype)
    kept = apply_mask(weight, nm_mask(Magnitude().score(weight), Pattern(2, 4))).double().sum().item()
    unstructured = weight.double().flatten().topk(weight.numel() // 2).values.sum().item()
    tolerance = 5e-4 if dtype is not torch.bfloat16 else 3
    assert weight.double().sum().item() == pytest.approx(4083.169, abs=tolerance)
    assert kept == pytest.approx(2852.377, abs=tolerance)
    assert unstructured == pytest.approx(3060.238, abs=tolerance)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(2, 3)], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((5, 12, 3, 3), 1), ((12, 5), 0), ((24,), 0), ((2, 3, 12), 2)])
def test_groups_run_along_the_given_dimension(pattern, shape, dim):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    last = scores.movedim(dim, -1).contiguous()
    expected = nm_mask(last.view(-1, 12), pattern).view(last.shape).movedim(-1, dim)
    mask = nm_mask(scores, pattern, dim)
    assert mask.is_contiguous()
    assert torch.equal(mask, expected)
    assert count_violations(mask, pattern, dim) == 0


def test_a_strided_weight_gives_the_mask_of_its_copy():
    scores = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).t()
    assert torch.equal(nm_mask(scores, Pattern(2, 4)), nm_mask(scores.contiguous(), Pattern(2, 4)))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(2, 5)], ids=str)
def test_ties_of_both_zeros_and_infinities_keep_the_lower_index(pattern):
    rest = [-1.0] * (pattern.m - 4)
    for row in ([-0.0, 0.0, 0.0, 0.0], [torch.inf] * 4, [0.0, -0.0, -torch.inf, -torch.inf]):
        assert nm_mask(torch.tensor([row + rest]), pattern)[0].tolist() == [True, True] + [False] * (pattern.m - 2)


def test_scores_do_not_change():
    scores = torch.randn(4, 8, requires_grad=True)
    before = scores.detach().clone()
    nm_mask(scores, Pattern(2, 4))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(2, 3)], ids=str)
def test_nan_scores_are_refused(pattern):
    scores = torch.ones(2, 12)
    scores[1, 5] = torch.nan
    with pytest.raises(ValueError, match="1 of 24 scores are NaN"):
        nm_mask(scores, pattern)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"dimension 1 of shape \(2, 6\) is not a multiple of 4"):
        nm_mask(torch.ones(2, 6), Pattern(2, 4))
    with pytest.raises(ValueError, match=r"shape \(8,\) has no dimension 1"):
        nm_mask(torch.ones(8), Pattern(2, 4))


def test_violations_are_counted_by_group():
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, -1.0], [0.0] * 4 + [1.0] * 4])
    assert count_violations(weight, Pattern(2, 4)) == 2
    assert count_violations(weight != 0, Pattern(3, 4)) == 1
    assert count_violations(weight.t(), Pattern(2, 4), dim=0) == 2


def test_pruned_weights_are_positive_zero_and_get_no_gradient():
    weight = torch.tensor([[-1.0, 2.0, -0.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False, True]])
    masked = apply_mask(weight, mask)
    masked.backward(torch.tensor([[5.0, 6.0, 7.0, -8.0]]))
    assert masked.tolist() == [[0.0, 2.0, 0.0, -3.0]]
    assert masked.signbit().tolist() == [[False, False, False, True]]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 6.0, 0.0, -8.0]]


def test_masks_of_another_shape_or_type_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4\).*\(2, 4\)"):
        apply_mask(torch.ones(2, 4), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        apply_mask(torch.ones(2, 4), torch.ones(2, 4))


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("1:32", 1, 32), ("15:16", 15, 16)])
def test_patterns_parse_and_print(text, n, m):
    assert parse_pattern(text) == Pattern(n, m)
    assert str(Pattern(n, m)) == text
    assert Pattern(n, m).sparsity == 1 - n / m


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2:4:8", "a:4", "-2:4", "2.0:4", "²:4", "0:4", "4:4", "5:4", "2:33"]
)
def test_bad_patterns_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^pattern [^\n]*(N:M|N of M)[^\n]*$"):
        parse_pattern(text)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_packed_bits_are_numpy_little_endian_and_unpack(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_any_shape_and_stride_unpacks():
    mask = (torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0)) > 0.5).transpose(0, 2)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (2, 4)),
        (torch.zeros(0, dtype=torch.uint8), (1,)),
        (torch.zeros(1, dtype=torch.int8), (8,)),
        (torch.zeros(1, 1, dtype=torch.uint8), (8,)),
        (torch.tensor([0b10000], dtype=torch.uint8), (4,)),
    ],
)
def test_invalid_packed_bytes_are_refused(packed, shape):
    with pytest.raises(ValueError, match="mask of"):
        unpack_bits(packed, shape)


def test_only_bool_tensors_pack():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        pack_bits(torch.ones(8))
