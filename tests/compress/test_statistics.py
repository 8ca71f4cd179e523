"""Statistics are sums over real positions with the masks in place, whatever training draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqat.compress.statistics import collect_statistics, first_batches
from sqat.data.batch import Batch
from sqat.modules.parametrize import insert_weights_, original_weight
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.criteria.sparsegpt import SparseGPT
from sqat.sparsity.criteria.taylor import Taylor
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.training.batches import Batches
from sqat.training.data_parallel import Loss
from tests.errors import raises_code

QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"
DENSE = "bert.encoder.layer.1.output.dense"
OWNERS = {name: name for name in (QUERY, KEY, DENSE)}


def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    logits = model(**batch.inputs).logits
    return {"task": nn.functional.cross_entropy(logits, batch.labels), "small": logits.square().mean()}


def collect(
    criterion: Criterion, model: nn.Module, owners: dict[str, str], loss: Loss, batches: Batches, seed: int = 0
) -> dict[str, Tensor]:
    rows = first_batches(batches, criterion.samples, seed)
    return collect_statistics(criterion, model, owners, loss, rows, seed)


def make_batches(count: int = 3) -> Batches:
    """Batches of 4 texts of 8 tokens, the second of which is half padding; labels alternate."""
    ids = torch.randint(5, 60, (count * 4, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1::4, 4:] = 0

    def collate(rows: list[int]) -> Batch:
        torch.rand(3)  # a processor may draw
        return Batch({"input_ids": ids[rows], "attention_mask": mask[rows]}, torch.tensor(rows) % 2, torch.tensor(rows))

    plan = [list(range(4 * i, 4 * i + 4)) for i in range(count)]
    return Batches(lambda epoch: plan, collate)


@pytest.fixture
def masked(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A tiny BERT with masks on three layers, in training mode, its dropout not 0."""
    model = make_model("bert")
    weights = {name: model.get_submodule(name).weight.detach() for name in OWNERS}
    insert_weights_(model, {name: nm_mask(w.abs(), parse_pattern("2:4")) for name, w in weights.items()}, ())
    return model.train()


def inputs_by_hook(model: nn.Module, batches: Batches, name: str) -> Tensor:
    """Rows that a layer sees at real positions, in eval mode."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    read = [batches.collate(rows) for rows in batches.plan(0)]
    model.eval()
    with torch.no_grad():
        for batch in read:
            model(**batch.inputs)
    hook.remove()
    model.train()
    return torch.cat([x[batch.inputs["attention_mask"].bool()] for x, batch in zip(seen, read, strict=True)])


def test_inputs_are_summed_over_real_positions(masked: nn.Module) -> None:
    batches = make_batches()
    squares = collect(Wanda(), masked, OWNERS, loss, batches)
    grams = collect(SparseGPT(), masked, OWNERS, loss, batches)
    for name in OWNERS:
        x = inputs_by_hook(masked, batches, name).double()
        assert len(x) == 3 * (3 * 8 + 4)
        torch.testing.assert_close(grams[name].double(), x.T @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(squares[name], grams[name].diagonal())


@pytest.mark.parametrize("average", ["squares", "mean"])
def test_gradients_are_those_of_the_masked_weight(masked: nn.Module, average: str) -> None:
    batches = make_batches()
    found = collect(Taylor(average=average), masked, OWNERS, loss, batches)
    assert all(parameter.grad is None for parameter in masked.parameters())
    masked.eval()
    for name in OWNERS:
        module = masked.get_submodule(name)
        mask = module.parametrizations.weight[0].mask
        original, expected = original_weight(module), torch.zeros_like(mask, dtype=torch.float32)
        for rows in batches.plan(0):
            masked.zero_grad()
            sum(loss(masked, batches.collate(rows)).values()).backward()
            expected += original.grad.square() if average == "squares" else original.grad
        torch.testing.assert_close(found[name] * mask, expected, rtol=1e-4, atol=1e-7)
        assert found[name][~mask].abs().max() > 0, "pruned weights get a score too: they may regrow"


def test_magnitude_needs_no_statistics(masked: nn.Module) -> None:
    def refuse(*_: object) -> dict[str, Tensor]:
        raise AssertionError

    assert collect(Magnitude(), masked, OWNERS, refuse, Batches(refuse, refuse), 0) == {}


@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), Taylor()])
def test_training_goes_on_as_if_nothing_had_been_collected(masked: nn.Module, criterion: Criterion) -> None:
    masked.bert.embeddings.eval()  # a part that stands still stays so
    modes = [module.training for module in masked.modules()]
    before, state = {k: v.clone() for k, v in masked.state_dict().items()}, torch.get_rng_state()
    first = collect(criterion, masked, OWNERS, loss, make_batches(), 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in masked.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())
    torch.rand(11)
    again = collect(criterion, masked, OWNERS, loss, make_batches(), 7)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_samples_bound_the_batches(masked: nn.Module) -> None:
    for samples, batches in ((1, 1), (4, 1), (5, 2), (8, 2), (100, 3)):
        found = collect(Wanda(samples=samples), masked, OWNERS, loss, make_batches())
        expected = collect(Wanda(), masked, OWNERS, loss, make_batches(batches))
        assert all(torch.equal(found[name], expected[name]) for name in OWNERS), samples


def test_layers_that_share_a_weight_are_summed(masked: nn.Module) -> None:
    apart = collect(SparseGPT(), masked, OWNERS, loss, make_batches())
    together = collect(SparseGPT(), masked, {**OWNERS, KEY: QUERY}, loss, make_batches())
    torch.testing.assert_close(together[QUERY], apart[QUERY] + apart[KEY])
    assert KEY not in together


def test_convolutions_are_seen_by_their_windows() -> None:
    net = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.Flatten())
    insert_weights_(net, {"0": torch.ones(4, 8, 3, 3, dtype=torch.bool)}, ())
    images = torch.randn(4, 8, 5, 5)

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixel_values: Tensor) -> Tensor:
            y: Tensor = self.net(pixel_values)
            return y

    batches = Batches(lambda epoch: [[0, 1], [2, 3]],
                lambda rows: Batch({"pixel_values": images[rows]}, torch.zeros(2), torch.zeros(2)))  # fmt: skip
    gram = collect(SparseGPT(), Images(), {"net.0": "net.0"}, loss, batches, 0)["net.0"]
    weight = original_weight(net[0]).detach()
    columns = weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close((columns @ gram * columns).sum(), net(images).square().sum(), rtol=1e-4, atol=1e-4)


def test_no_rows_are_an_error(masked: nn.Module) -> None:
    with raises_code("no-rows"):
        collect(Wanda(), masked, OWNERS, loss, make_batches(0))


def test_a_layer_that_no_gradient_reaches_is_an_error(masked: nn.Module) -> None:
    def first_layer(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": model.bert(**batch.inputs, output_hidden_states=True).hidden_states[1].square().mean()}

    with raises_code("unsupported-model", f"criterion taylor cannot score {DENSE}: no row"):
        collect(Taylor(), masked, OWNERS, first_layer, make_batches())


def test_statistics_that_are_not_finite_are_an_error(masked: nn.Module) -> None:
    with torch.no_grad():
        masked.bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    with raises_code("non-finite", QUERY):
        collect(Wanda(), masked, OWNERS, loss, make_batches())
