"""SR-STE against its update formula, written out for one linear and one step of SGD."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sqat.modules.parametrize import insert_weights_, original_weight, remove_weights_
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules.sr_ste import SrSte

PATTERN = Pattern(2, 4)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_one_step_is_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    schedule, net, x, target = SrSte(decay=decay), nn.Linear(8, 3, bias=False), torch.randn(5, 8), torch.randn(5, 3)
    dense = net.weight.detach().double().clone()
    mask = schedule.choose_mask(dense.abs(), PATTERN, 0.5, None)
    transforms = insert_weights_(net, {"": mask}, (), [""])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = (net(x) - target).square().sum() / 2 + schedule.decay_loss(original_weight(net), mask)
    loss.backward()
    optimizer.step()
    kept = mask.double()
    gradient = (x.double() @ (dense * kept).T - target.double()).T @ x.double()  # by the masked weight
    wanted = dense - 0.1 * (gradient + decay * (1 - kept) * dense)
    torch.testing.assert_close(original_weight(net).detach().double(), wanted, rtol=1e-5, atol=1e-6)
    remove_weights_(net, transforms)
    torch.testing.assert_close(net.weight.detach().double(), wanted * kept, rtol=1e-5, atol=1e-6)
    assert not net.weight[~mask].any()


def test_a_pruned_weight_that_grows_comes_back() -> None:
    """Two of four inputs matter most, and they start smallest: straight-through gradients find them, others cannot."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    target = x @ torch.tensor([[0.5, 0.5, 2.0, -2.0]]).T
    losses = {}
    for straight in (True, False):
        net, schedule = nn.Linear(4, 1, bias=False), SrSte()
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[0.4, 0.3, 0.1, 0.1]]))
        transforms = insert_weights_(net, {"": torch.ones(1, 4, dtype=torch.bool)}, (), [""] if straight else [])
        mask, weight = transforms[""].mask, original_weight(net)
        assert mask is not None
        optimizer = torch.optim.SGD([weight], lr=0.05)
        for _ in range(50):
            mask.copy_(schedule.choose_mask(weight.detach().abs(), PATTERN, 0.5, mask))
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean() + schedule.decay_loss(weight, mask)
            loss.backward()
            optimizer.step()
        losses[straight] = float(loss.detach())
    assert losses[True] < 1 < 4 < losses[False], "2 * 0.5^2 is what the best two leave, 2 * 2^2 the others"


def test_the_penalty_pulls_at_pruned_weights_alone() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = nm_mask(weight.abs(), PATTERN)
    SrSte(decay=0.5).decay_loss(weight, mask).backward()
    torch.testing.assert_close(weight.grad, 0.5 * weight.detach() * ~mask)


def test_straight_through_masks_compute_the_same() -> None:
    weight = torch.tensor([[-1.0, 2.0, -3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False, True]])
    masked = apply_mask(weight, mask, straight_through=True)
    assert torch.equal(masked.view(torch.int32), apply_mask(weight, mask).view(torch.int32)), "+0.0 too"
    masked.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_the_mask_ignores_the_previous_one() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert SrSte().choose_mask(scores, PATTERN, 0.5, torch.tensor([[True, True, False, False]])).tolist() == [
        [False, False, True, True]
    ]
    assert SrSte().sparsities(PATTERN) == (0.5,)
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        SrSte().choose_mask(scores.log1p().log().masked_fill(scores == 1, torch.nan), PATTERN, 0.5, None)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"decay": -1.0}, "decay must be a number of at least 0, got -1"),
        ({"decay": float("inf")}, "decay must be a number of at least 0, got inf"),
        ({"until": 0.0}, r"until must lie in \(0, 1\], got 0"),
        ({"until": 1.5}, r"until must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_knobs_of_sr_ste_are_refused(knobs: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        SrSte(**knobs)
