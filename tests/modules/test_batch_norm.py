"""Folding batch norms: the same numbers before and after, zeros kept, the state a plain batch norm's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sqat.modules.batch_norm import absorb_folded_norms_, find_foldable_norms, find_folded_norms, fold_batch_norms_
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern


class Net(nn.Module):
    """Two convolutions with norms, one of them grouped and with a bias, and a norm that follows none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, eps=1e-3))
        self.last_norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.first_norm(self.first(x)))
        y: torch.Tensor = self.last_norm(self.second(x))
        return y


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    return model.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def test_pairs_are_norms_that_follow_a_convolution(net: nn.Module) -> None:
    assert find_foldable_norms(net) == {"first_norm": "first", "second.1": "second.0"}


def test_folded_model_computes_the_same(net: nn.Module, x: torch.Tensor) -> None:
    before = net(x)
    assert fold_batch_norms_(net) == {"first_norm": "first", "second.1": "second.0"}
    assert find_folded_norms(net) == {"first": "first_norm", "second.0": "second.1"}
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_training_mode_uses_no_batch_statistics(net: nn.Module, x: torch.Tensor) -> None:
    fold_batch_norms_(net)
    net.last_norm = nn.Identity()
    wanted = net(x)
    torch.testing.assert_close(net.train()(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(net(2 * x[:1])[0], net(torch.cat([2 * x[:1], x]))[0], rtol=1e-5, atol=1e-6)


def test_state_loads_into_the_plain_model_and_computes_the_same(net: nn.Module, x: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    fold_batch_norms_(net)
    plain.load_state_dict(net.state_dict())  # strict: the very names and shapes
    torch.testing.assert_close(plain(x), net(x), rtol=1e-5, atol=1e-5)


def test_folding_again_changes_no_bit(net: nn.Module, x: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    fold_batch_norms_(net)
    plain.load_state_dict(net.state_dict())
    fold_batch_norms_(plain)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    assert torch.equal(plain(x), net(x))
    assert fold_batch_norms_(net) == {}


def test_masks_keep_and_zeros_are_positive(net: nn.Module) -> None:
    assert isinstance(net.first, nn.Conv2d)
    pattern = parse_pattern("2:4")
    by_inputs = nm_mask(net.first.weight.detach().abs().permute(0, 2, 3, 1).reshape(-1, 4), pattern)
    mask = by_inputs.reshape(8, 3, 3, 4).permute(0, 3, 1, 2)
    net.first.weight.data.mul_(mask)
    fold_batch_norms_(net)
    weight = net.first.weight.detach()
    assert torch.equal(weight != 0, mask)
    assert not torch.signbit(weight[~mask]).any()


def test_absorbed_model_computes_the_same_without_norms(net: nn.Module, x: torch.Tensor) -> None:
    before = net(x)
    fold_batch_norms_(net)
    absorb_folded_norms_(net)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert [type(m).__name__ for m in net.modules() if "Norm" in type(m).__name__] == ["BatchNorm2d"]


def test_the_bias_that_remains_is_trained(net: nn.Module, x: torch.Tensor) -> None:
    fold_batch_norms_(net)
    net(x).sum().backward()
    trained = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert {"first.weight", "first_norm.bias", "second.0.weight", "second.1.bias"} <= trained
    assert not {"first_norm.weight", "second.1.weight"} & {name for name, _ in net.named_parameters()}
