"""`sqat.reconstruct`: closed forms, what stays, what is measured, and bad arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import sqat
from sqat.compress import partial_runs
from sqat.errors import ErrorCode
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import Pattern
from tests.api.conftest import Batches, assert_pruned, copy_state
from tests.errors import raises_code
from tests.tiny import build_model

WIDTH = 16


class Linears(nn.Module):
    """Two blocks of one linear each; with ``skip`` the second also reads what the first reads."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        output: Tensor = self.blocks[1](first + x if self.skip else first)
        return output


def prune_linears(model: nn.Module) -> sqat.Masks:
    """2:4 by magnitude in each linear: layers this narrow are too small for `sqat.prune`'s own choice."""
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept[name] = nm_mask(module.weight.detach().abs(), Pattern(2, 4))
            module.weight.data *= kept[name]
    return sqat.Masks(kept, dict.fromkeys(kept, "2:4"), {})


def fit_rows(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Outputs of the weighted least-squares fit, row by row, of y [N,O] by the inputs x [N,C] that the mask keeps."""
    weights = 1 / np.linalg.norm(y, axis=1, keepdims=True)  # each token's error counts relative to its size
    fitted = np.empty_like(y)
    for row, kept in enumerate(mask):
        inputs = np.column_stack([x[:, kept], np.ones(len(x))])
        solution = np.linalg.lstsq(inputs * weights, y[:, row] * weights[:, 0], rcond=None)[0]
        fitted[:, row] = inputs @ solution
    return fitted


def error(output: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean(((output - target) ** 2).sum(1) / (target**2).sum(1)))


def test_linear_blocks_reach_their_least_squares_solutions() -> None:
    teacher = Linears().eval()
    model, x = copy.deepcopy(teacher), torch.randn(32, 8, WIDTH) @ torch.randn(WIDTH, WIDTH)  # correlated, as in models
    masks = prune_linears(model)
    found = sqat.reconstruct(model, teacher, [{"x": x}], masks, steps_per_block=150, learning_rate=0.03)
    inputs = dense = x.reshape(-1, WIDTH).double().numpy()
    for number in range(2):
        before, after = found[f"blocks.{number}"]
        sparse, own = model.double().blocks[number][0], teacher.double().blocks[number][0]  # type: ignore[index]
        dense = own(torch.from_numpy(dense)).detach().numpy()
        best = error(fit_rows(inputs, dense, masks.kept[f"blocks.{number}.0"].numpy()), dense)
        assert 0.999 * best < after < 1.005 * best < 0.9 * before
        inputs = sparse(torch.from_numpy(inputs)).detach().numpy()
        assert error(inputs, dense) == pytest.approx(after, rel=1e-5)
    model.float()
    assert_pruned(model, masks)


def test_a_model_that_equals_its_teacher_stays_as_it_is(model: Any, batches: Batches) -> None:
    masks = sqat.prune(model)
    before = copy_state(model)
    found = sqat.reconstruct(model, copy.deepcopy(model), batches, masks, steps_per_block=3)
    assert {*found.values()} == {(0.0, 0.0)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_learn_and_nothing_else_does(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    masks = sqat.prune(model)
    start, state, draws = copy_state(model), torch.get_rng_state(), copy_state(teacher)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # as a training loop leaves them that starts with zero_grad
    found = sqat.reconstruct(model, teacher, batches, masks, steps_per_block=8, learning_rate=3e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(after < 0.8 * before for before, after in found.values())
    assert_pruned(model, masks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (".encoder." not in name or not name.endswith(("weight", "bias"))), (
            name
        )
    assert all(torch.equal(tensor, draws[name]) for name, tensor in teacher.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in (*model.parameters(), *teacher.parameters()))


def test_padding_does_not_count(model: Any, batches: Batches) -> None:
    results = []
    for padding in (0, 7):
        teacher, student = copy.deepcopy(model), copy.deepcopy(model)
        masks = sqat.prune(student)
        padded = [{**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)}
                  for batch in batches]  # fmt: skip
        sqat.reconstruct(student, teacher, padded, masks, steps_per_block=2)
        results.append(copy_state(student))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def outputs_of(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> list[np.ndarray]:
    """What blocks put out for the real tokens of a batch, without sqat."""
    found: list[np.ndarray] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        found.append(output[batch["attention_mask"].bool()].detach().double().numpy())

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_with_scales_the_quantized_blocks_learn(model: Any, batches: Batches, placement: Any) -> None:
    """The errors are those of whole passes of the quantized model, before and after."""
    teacher = copy.deepcopy(model)
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)

    def errors(names: list[str]) -> list[float]:
        with sqat.quantized(model, masks, scales):
            each = [[error(x, y) for x, y in zip(outputs_of(model, names, batch), outputs_of(teacher, names, batch),
                                                 strict=True)] for batch in batches]  # fmt: skip
        return [float(value) for value in np.mean(each, axis=0)]

    amax, first = dict(scales.amax), errors(["bert.encoder.layer.0"])[0]
    found = sqat.reconstruct(model, teacher, batches, masks, scales, steps_per_block=6, learning_rate=3e-3)
    assert found["bert.encoder.layer.0"][0] == pytest.approx(first, rel=1e-5)
    assert [after for _, after in found.values()] == pytest.approx(errors(list(found)), rel=1e-5)
    assert all(after < before for before, after in found.values())
    assert dict(scales.amax) == amax
    assert_pruned(model, masks)


def trained_states(make: Callable[[], nn.Module], batches: Batches, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """State of a reconstructed model, with passes that go on from remembered outputs and with whole passes."""
    found = []
    for limit in (1 << 20, -1):
        monkeypatch.setattr(partial_runs, "MAX_BYTES", limit)
        model = make()
        teacher = copy.deepcopy(model)
        sqat.reconstruct(model, teacher, batches, prune_linears(model), steps_per_block=3)
        found.append(copy_state(model))
    return found


@pytest.mark.parametrize("skip", [False, True])
def test_passes_that_go_on_from_outputs_change_no_bit(monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    """A model with a connection past a block runs whole passes."""
    net = Linears(skip).eval()
    batches = [{"x": torch.randn(4, 3, WIDTH)} for _ in range(2)]
    short, whole = trained_states(lambda: copy.deepcopy(net), batches, monkeypatch)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in short.items())


def test_remembered_outputs_spare_the_blocks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    net = Linears().eval()
    for number, block in enumerate(net.blocks):
        block[0].register_forward_hook(lambda *_, number=number: calls.append(number))  # type: ignore[index]
    model = copy.deepcopy(net)
    masks = prune_linears(model)
    batches = [{"x": torch.randn(4, 3, WIDTH)} for _ in range(2)]
    sqat.reconstruct(model, net, batches, masks, steps_per_block=50)
    assert calls.count(0) < 2 * (50 + 20)  # 50 steps of its own; both models share the list


def vit() -> tuple[nn.Module, Batches]:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**shape, image_size=8, patch_size=4)  # type: ignore[arg-type]
    model = transformers.ViTForImageClassification(config).eval()
    return model, [{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(2)]


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2", "llama", "gpt2", "vit"])
def test_other_families_learn(family: str, batches: Batches) -> None:
    model, rows = vit() if family == "vit" else (build_model(family), batches)
    teacher = copy.deepcopy(model)
    masks = sqat.prune(model)
    found = sqat.reconstruct(model, teacher, rows, masks, steps_per_block=6, learning_rate=3e-3)
    assert len(found) == 2
    assert all(after < before for before, after in found.values())


def albert() -> nn.Module:
    return build_model("albert", num_hidden_layers=2)


BAD: dict[str, tuple[dict[str, Any], ErrorCode, str]] = {
    "no batches": ({"batches": []}, "usage", "list of batches"),
    "a generator": ({"batches": iter([])}, "usage", "list of batches"),
    "neither masks nor scales": ({"masks": None}, "usage", "neither masks nor scales"),
    "a teacher in training mode": ({"teacher": build_model().train()}, "usage", "training mode"),
    "a teacher with wider blocks": ({"teacher": build_model(intermediate_size=80)}, "model-mismatch", "no block"),
    "masks outside the blocks": ({"masks": sqat.Masks({}, {}, {})}, "no-layer", "no block has a layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line(model: Any, batches: Batches, name: str) -> None:
    more, code, words = BAD[name]
    teacher = copy.deepcopy(model)
    start = {"teacher": teacher, "batches": batches, "masks": sqat.prune(model), **more}
    with raises_code(code, words):
        sqat.reconstruct(model, **start)
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_blocks_that_share_their_weights_are_refused(batches: Batches) -> None:
    model = albert()
    teacher = copy.deepcopy(model)
    with raises_code("unsupported-model", "do not run once each"):
        sqat.reconstruct(model, teacher, batches, sqat.prune(model))


def test_a_rate_that_is_far_too_high_is_one_line(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    with raises_code("non-finite", "lower learning_rate"):
        sqat.reconstruct(model, teacher, batches, sqat.prune(model), steps_per_block=9, learning_rate=1e30)
