"""Criteria against loops over single weights, and against magnitude where they claim to be better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sqat.sparsity.columns import from_columns, input_windows, to_columns
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.criteria.taylor import Taylor
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_magnitude_is_the_absolute_value() -> None:
    weight = draw(4, 8).requires_grad_()
    scores = Magnitude().score(weight)
    assert scores.tolist() == [[abs(w) for w in row] for row in weight.tolist()]
    assert not scores.requires_grad


def test_wanda_is_weight_times_norm_of_its_input() -> None:
    weight, x = draw(4, 8), draw(10, 8, seed=1)
    scores = Wanda().score(weight, x.square().sum(0))
    norms = [sum(float(row[j]) ** 2 for row in x) ** 0.5 for j in range(8)]
    wanted = [[abs(float(weight[i, j])) * norms[j] for j in range(8)] for i in range(4)]
    torch.testing.assert_close(scores, torch.tensor(wanted))


@pytest.mark.parametrize("average", ["squares", "mean"])
def test_taylor_is_weight_times_gradient(average: str) -> None:
    weight, gradients = draw(4, 8), draw(5, 4, 8, seed=1)
    sums = gradients.sum(0) if average == "mean" else gradients.square().sum(0)
    scores = Taylor(average=average).score(weight, sums)
    for i in range(4):
        for j in range(8):
            of_batches = [float(g[i, j]) for g in gradients]
            size = abs(sum(of_batches)) if average == "mean" else sum(g * g for g in of_batches) ** 0.5
            assert float(scores[i, j]) == pytest.approx(abs(float(weight[i, j])) * size, rel=1e-5)


def test_wanda_beats_magnitude_where_inputs_differ_in_size() -> None:
    weight, x = draw(32, 64), draw(256, 64, seed=1) * draw(64, seed=2).exp()
    by_wanda = weight * nm_mask(Wanda().score(weight, x.square().sum(0)), TWO_OF_FOUR)
    by_magnitude = weight * nm_mask(Magnitude().score(weight), TWO_OF_FOUR)
    assert (x @ (weight - by_wanda).T).norm() < 0.8 * (x @ (weight - by_magnitude).T).norm()


def test_taylor_beats_magnitude_where_outputs_matter_unequally() -> None:
    """Hidden units of unequal size: the loss knows which of them the second layer needs."""
    x, second = draw(256, 16, seed=1), draw(1, 32, seed=2)
    first = draw(32, 16) * draw(32, 1, seed=3).exp()
    target = torch.relu(x @ first.T) @ second.T + draw(256, 1, seed=4)

    def loss(read: Tensor) -> Tensor:
        return functional.mse_loss(torch.relu(x @ first.T) @ read.T, target)

    squares = torch.zeros(1, 32)
    for rows in torch.arange(256).split(8):
        weight = second.clone().requires_grad_()
        functional.mse_loss(torch.relu(x[rows] @ first.T) @ weight.T, target[rows]).backward()
        assert weight.grad is not None
        squares += weight.grad.square()
    by_taylor = second * nm_mask(Taylor().score(second, squares), TWO_OF_FOUR)
    by_magnitude = second * nm_mask(Magnitude().score(second), TWO_OF_FOUR)
    assert loss(by_taylor) < 0.95 * loss(by_magnitude)


CONVOLUTIONS = {
    "plain": nn.Conv2d(8, 4, 3),
    "padded and strided": nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "same": nn.Conv2d(8, 4, 3, dilation=2, padding="same"),
    "circular": nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    "1x1": nn.Conv2d(8, 4, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows_times_columns_is_the_convolution(name: str) -> None:
    module, x = CONVOLUTIONS[name], draw(2, 8, 9, 7)
    windows = input_windows(module, x)
    assert module.bias is not None
    wanted = (module(x) - module.bias[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(windows @ to_columns(module.weight).T, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(from_columns(to_columns(module.weight), module.weight.shape), module.weight)


def test_wanda_uses_the_input_norm_of_each_window_position() -> None:
    module, x = nn.Conv2d(8, 4, 3, padding=1), draw(2, 8, 5, 5)
    scores = Wanda().score(module.weight, input_windows(module, x).square().sum(0))
    padded = functional.pad(x, (1, 1, 1, 1))
    for channel, row, column in [(0, 0, 0), (3, 1, 2), (7, 2, 1)]:
        seen = padded[:, channel, row : row + 5, column : column + 5]
        wanted = module.weight[:, channel, row, column].abs() * seen.norm()
        torch.testing.assert_close(scores[:, channel, row, column], wanted)


@pytest.mark.parametrize("kind", [Wanda, Taylor])
def test_samples_and_statistics_are_required(kind: type[Wanda | Taylor]) -> None:
    with pytest.raises(ValueError, match=r"^samples must be at least 1, got 0$"):
        kind(samples=0)
    with pytest.raises(ValueError, match="needs statistics"):
        kind().score(draw(2, 4), None)
