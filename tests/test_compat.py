"""The private APIs behind `sqat.compat` do what it says, in the version that each test is named after."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

from sqat import compat


class Watching(TorchDispatchMode):
    """A mode that sees every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def tiny_bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))  # fmt: skip


def test_torch_2_13_tells_whether_operators_are_recorded_or_replaced() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(compat.is_tracing())
        return x + 1

    look(torch.ones(1))
    torch.jit.trace(look, torch.ones(1), check_trace=False)
    with Watching():
        look(torch.ones(1))
    assert seen == [False, True, True]


def test_torch_2_13_tells_whether_a_tensor_has_memory() -> None:
    assert compat.has_storage(torch.ones(2))
    assert not compat.has_storage(torch.ones(2).to_sparse())


def test_torch_2_13_counts_in_place_changes() -> None:
    x = torch.ones(2)
    before = compat.tensor_version(x)
    x.add_(1)
    assert compat.tensor_version(x) == compat.tensor_version(x[:1]) == before + 1


def test_torch_2_13_pads_as_a_convolution_does() -> None:
    convolution = nn.Conv2d(1, 1, 3, padding=(1, 2), bias=False)
    x = torch.randn(1, 1, 4, 4)
    padded = functional.pad(x, compat.padding_widths(convolution))
    torch.testing.assert_close(functional.conv2d(padded, convolution.weight), convolution(x))


def test_torch_2_13_keeps_hooks_and_parameters_in_dictionaries() -> None:
    layer = nn.Linear(2, 2)
    before = sum(map(len, compat.hook_tables(layer)))
    handles = [layer.register_forward_hook(lambda *_: None), layer.register_full_backward_hook(lambda *_: None),
               layer.register_state_dict_post_hook(lambda *_: None)]  # fmt: skip
    assert sum(map(len, compat.hook_tables(layer))) == before + len(handles)
    compat.own_parameters(layer)["weight"] = other = nn.Parameter(torch.eye(2))
    assert layer.weight is other


def test_torch_2_13_has_batch_norms_of_one_class() -> None:
    assert all(issubclass(kind, compat.BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert not issubclass(nn.GroupNorm, compat.BatchNorm)


@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="this build of torch has no cuSPARSELt")
def test_torch_2_13_multiplies_2_to_4_weights_with_cusparselt() -> None:
    weight = torch.tensor([1.0, 2.0, 0.0, 0.0]).repeat(64, 16).half().cuda()
    x = torch.randn(64, 64).half().cuda()
    compressed = compat.compress_2to4(weight)
    number = compat.search_2to4_algorithm(compressed, x.t())
    torch.testing.assert_close(compat.multiply_2to4(compressed, x.t(), alg_id=number), weight @ x.t())


@pytest.mark.parametrize("name", ["_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"])
def test_torch_2_13_has_cutlass_products_with_a_type_of_output(name: str) -> None:
    assert "out_dtype" in str(getattr(torch.ops.aten, name).default._schema)


def test_transformers_5_23_calls_a_registered_attention() -> None:
    model, seen = tiny_bert(), []
    assert compat.can_set_attention(model)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        seen.append(mask.shape)
        return value.transpose(1, 2), None

    compat.register_attention("sqat_test", attend)
    compat.register_attention("sqat_test", attend)
    model.set_attn_implementation("sqat_test")
    assert compat.attention_name(model) == "sqat_test"
    model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 0]]))
    assert [*seen] == [torch.Size([1, 1, 3, 3])]


def test_transformers_5_23_gives_every_attention_its_own_eager_function() -> None:
    """The second argument of `get_interface`; `compat.eager_attention` finds it by its name."""
    call = re.compile(r"ALL_ATTENTION_FUNCTIONS\.get_interface\(\s*[^,()]+,\s*(\w+)\s*,?\s*\)")
    files = list((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    texts = [text for file in files if "get_interface(" in (text := file.read_text(encoding="utf-8"))]
    names = [name for text in texts for name in call.findall(text)]
    assert len(names) == sum(text.count("ALL_ATTENTION_FUNCTIONS.get_interface(") for text in texts) > 400
    assert all(name.endswith("eager_attention_forward") for name in names)
    module = tiny_bert().encoder.layer[0].attention.self
    assert compat.eager_attention(module) is transformers.models.bert.modeling_bert.eager_attention_forward
    inherited = type("Mine", (type(module),), {})
    assert compat.eager_attention(inherited.__new__(inherited)) is compat.eager_attention(module)
    assert compat.eager_attention(torch.nn.Linear(2, 2)) is None


def test_transformers_5_23_is_silent_only_while_asked() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with compat.quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_transformers_5_23_finds_files_of_a_source(tmp_path: Any) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert compat.find_source_file(str(tmp_path), "modules.json", None) == str(tmp_path / "modules.json")
    assert compat.find_source_file(str(tmp_path), "other.json", None) is None


def test_transformers_5_23_draws_the_weights_of_one_module(tmp_path: Any) -> None:
    tiny_bert().save_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compat.draw_weights_(model, model.pooler.dense)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"pooler.dense.weight"}
    assert 0.01 < float(model.pooler.dense.weight.detach().std()) < 0.03  # the family's, not torch's
