"""Masks set at their steps: of convolutions, of shared weights, with sparsegpt's corrections of the trained weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.compress.mask_schedule import MaskSchedule, weight_owners, with_mask_decay
from sqat.compress.statistics import collect_statistics, first_batches
from sqat.data.batch import Batch
from sqat.modules.parametrize import get_layer, original_weight
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import Pattern
from sqat.training.batches import Batches
from tests.errors import raises_code

PATTERN = Pattern(2, 4)
ALIKE = {"kernel": "kernel", "first": "first", "second": "second"}


class Net(nn.Module):
    """A convolution and two linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Conv2d(8, 16, 3, padding=1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = torch.relu(self.kernel(pixel_values)).mean((2, 3))
        y: Tensor = self.second(torch.relu(self.first(hidden)))
        return y


def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"task": (model(**batch.inputs) - 1).square().mean()}


def collate(rows: list[int]) -> Batch:
    """Images whose neighbouring pixels and whose channels are alike, as in pictures."""
    noise = torch.randn(64, 9, 8, 8, generator=torch.Generator().manual_seed(2))
    images = nn.functional.avg_pool2d(noise[:, 1:] + noise[:, :1], 3, stride=1)
    return Batch({"pixel_values": images[rows]}, torch.zeros(len(rows)), torch.zeros(len(rows)))


BATCHES = Batches(lambda epoch: [list(range(start, start + 16)) for start in range(0, 64, 16)], collate)


def make_masks(net: nn.Module, collected: Mapping[str, Tensor] | None = None, **config: Any) -> MaskSchedule:
    prune = PruneConfig.model_validate(config)

    def collect(owners: Mapping[str, str]) -> Mapping[str, Tensor]:
        batches = first_batches(BATCHES, prune.criterion.samples, 0)
        return collected or collect_statistics(prune.criterion, net, owners, loss, batches)

    return MaskSchedule(net, dict.fromkeys(ALIKE, PATTERN), prune.criterion, prune.schedule, {0: 0, 3: 1}, collect)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_convolutions_and_shared_weights_reach_the_pattern(criterion: str) -> None:
    net = Net()
    masks = make_masks(net, criterion=criterion, schedule="per-group")
    assert weight_owners(net, ALIKE) == {**ALIKE, "second": "first"}
    for step, zeros in enumerate((0.25, 0.25, 0.25, 0.5)):
        before = {name: original_weight(get_layer(net, name)).detach().clone() for name in ALIKE}
        masks.before_step(step)
        corrected = [name for name in ALIKE if not torch.equal(original_weight(get_layer(net, name)), before[name])]
        assert corrected == (list(ALIKE) if criterion == "sparsegpt" and step in (0, 3) else [])
        assert all(float((~transform.mask).float().mean()) == zeros for transform in masks.transforms.values())
    assert masks.is_finished
    final = masks.remove()
    assert all(count_violations(get_layer(net, name).weight, PATTERN) == 0 for name in ALIKE)
    assert torch.equal(final["first"], final["second"])


def test_sparsegpt_keeps_outputs_closer_than_magnitude_or_wanda() -> None:
    errors = {}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        net, batch = Net(), collate(list(range(64)))
        with torch.no_grad():
            expected = net.kernel(batch.inputs["pixel_values"])
            masks = make_masks(net, criterion=criterion, schedule={"name": "per-group", "num_masks": 1})
            masks.before_step(0)
            errors[criterion] = float((net.kernel(batch.inputs["pixel_values"]) - expected).norm())
    assert errors["sparsegpt"] < 0.95 * min(errors["wanda"], errors["magnitude"])


def test_a_matrix_without_inverse_is_an_error_with_its_layer() -> None:
    statistics: Mapping[str, Tensor] = {"kernel": torch.ones(72, 72), "first": torch.ones(16, 16)}
    masks = make_masks(Net(), statistics, criterion={"name": "sparsegpt", "damping": 1e-30}, schedule="per-group")
    with raises_code("unsupported-model", "cannot prune kernel: X'X of 72 inputs has no inverse"):
        masks.before_step(0)


def test_sr_ste_decays_a_shared_weight_once() -> None:
    net = Net()
    masks = make_masks(net, schedule={"name": "sr-ste", "decay": 0.5})
    masks.before_step(0)
    part = with_mask_decay(loss, masks)(net, collate([0]))["decay"]
    part.backward()
    for name in ("kernel", "first"):
        weight = original_weight(get_layer(net, name))
        mask = nm_mask(weight.detach().abs(), PATTERN)
        torch.testing.assert_close(weight.grad, 0.5 * weight.detach() * ~mask)
    assert with_mask_decay(loss, make_masks(Net(), schedule="per-group")) is loss
    assert with_mask_decay(loss, make_masks(Net(), schedule={"name": "sr-ste", "decay": 0})) is loss
