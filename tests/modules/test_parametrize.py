"""Masks and fake quantizers on weights: they hold whatever the optimizer does, and come off without a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.modules.parametrize import insert_weights_, original_weight, remove_weights_
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3))


def masks_of(net: nn.Sequential, names: tuple[str, ...] = ("0", "2")) -> dict[str, Tensor]:
    return {name: nm_mask(net.get_submodule(name).weight.detach().abs(), parse_pattern("2:4")) for name in names}


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int32)


@pytest.mark.parametrize("quantize", [False, True], ids=["masked", "quantized"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (3, 0.1)])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_pruned_weight_stays_pruned(
    optimizer: str, accumulation: int, clip: float | None, precision: str, quantize: bool
) -> None:
    net = make_net()
    masks = masks_of(net)
    with torch.no_grad():
        net[0].weight[~masks["0"]] = -0.3  # pruned weights are not zero to begin with
    transforms = insert_weights_(net, masks, ("0", "2", "4") if quantize else ())
    updater = OPTIMIZERS[optimizer](list(net.parameters()))
    before = {name: original_weight(net.get_submodule(name)).detach().clone() for name in masks}
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for _ in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = net(torch.randn(8, 16, generator=generator)).float().square().mean()
            loss.backward()
        for name, mask in masks.items():
            gradient = original_weight(net.get_submodule(name)).grad
            assert gradient is not None
            assert not gradient[~mask].any(), "pruned weights get no gradient"
            assert gradient[mask].any()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        updater.step()
        updater.zero_grad()
        for name, mask in masks.items():
            seen = net.get_submodule(name).weight
            assert not bits(seen)[~mask].any(), "what the forward pass sees is +0.0"
    removed = remove_weights_(net, transforms)
    assert set(removed) == set(masks)
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight
        assert torch.equal(removed[name], mask)
        assert not bits(weight)[~mask].any()
        assert (weight[mask] != before[name][mask]).all(), "the others were trained"


@pytest.mark.parametrize("quantize", [False, True], ids=["masked", "quantized"])
def test_training_is_that_of_an_explicit_product(quantize: bool) -> None:
    def fake(weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(1) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127) if quantize else weight

    net, reference = make_net(), make_net()
    masks = masks_of(net)
    insert_weights_(net, masks, masks if quantize else ())
    ours = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        hidden = x
        for name, layer in reference.named_children():
            if name in masks:
                hidden = nn.functional.linear(hidden, fake(layer.weight * masks[name]), layer.bias)
            else:
                hidden = layer(hidden)
        hidden.square().mean().backward()
        for updater in (ours, theirs):
            updater.step()
            updater.zero_grad()
    for name in masks:
        assert torch.equal(original_weight(net.get_submodule(name)), reference.get_submodule(name).weight)


def test_removal_leaves_plain_layers() -> None:
    net = make_net()
    masks = masks_of(net, ("0",))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    transforms = insert_weights_(net, masks, ("0", "2"))
    assert type(net[0]) is not nn.Linear
    assert remove_weights_(net, transforms).keys() == {"0"}
    assert all(type(net[i]) is nn.Linear and not parametrize.is_parametrized(net[i]) for i in (0, 2, 4))
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters()), "the optimizer's own"
    after = net.state_dict()
    assert set(after) == set(before)
    assert torch.equal(after["0.weight"], torch.where(masks["0"], before["0.weight"], 0.0))
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight"), (
        "not quantized for good"
    )


def test_negative_zeros_go() -> None:
    net = make_net()
    masks = masks_of(net, ("0",))
    with torch.no_grad():
        net[0].weight[masks["0"].logical_not()] = -0.0
        net[0].weight[0] = -0.0
    for quantized in ((), ("0",)):
        transforms = insert_weights_(net, masks, quantized)
        assert not bits(net[0].weight)[~masks["0"]].any()
        remove_weights_(net, transforms)
        assert not bits(net[0].weight)[~masks["0"]].any()
        assert not bits(net[0].weight)[0].any()


def test_a_mask_changed_in_place_holds_at_once() -> None:
    net = make_net()
    transforms = insert_weights_(net, {"0": torch.ones(32, 16, dtype=torch.bool)}, ())
    assert (net[0].weight != 0).all()
    mask = transforms["0"].mask
    assert mask is not None
    mask[:, ::2] = False
    assert not net[0].weight[:, ::2].any()
    assert "0.parametrizations.weight.0.mask" in net.state_dict(), "and is part of what a resumed run loads"
    assert torch.equal(remove_weights_(net, transforms)["0"], mask)


def test_masks_are_copied() -> None:
    net, mask = make_net(), torch.ones(32, 16, dtype=torch.bool)
    held = insert_weights_(net, {"0": mask}, ())["0"].mask
    assert held is not None
    held[:] = False
    assert mask.all()


@pytest.mark.parametrize("quantize", [False, True])
def test_tied_weights_stay_tied(quantize: bool) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    mask = masks_of(net, ("0",))["0"]
    transforms = insert_weights_(net, {"0": mask, "2": mask}, ("0", "2") if quantize else ())
    assert original_weight(net[0]) is original_weight(net[2])
    assert len(list(net.parameters())) == 3
    updater = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        net(torch.randn(4, 16)).square().mean().backward()
        assert not original_weight(net[0]).grad[~mask].any()
        updater.step()
        updater.zero_grad()
    remove_weights_(net, transforms)
    assert net[0].weight is net[2].weight
    assert not bits(net[0].weight)[~mask].any()


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="1 is a GELU, neither a Linear nor a Conv2d"):
        insert_weights_(make_net(), {}, ["1"])
    net = make_net()
    with pytest.raises(AttributeError):
        insert_weights_(net, masks_of(net, ("0",)), ["0", "9"])
    assert not hasattr(net[0], "parametrizations"), "nothing is changed"
    insert_weights_(net, {"0": torch.ones(3, 3, dtype=torch.bool)}, [])
    with pytest.raises(ValueError, match="must be bool of the weight's shape"):
        net(torch.ones(1, 16))
