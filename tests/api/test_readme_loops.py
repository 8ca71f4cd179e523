"""The Python blocks of the README's section on your own training loop, run on a tiny model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from tests.tiny import VOCABULARY, MakeModel

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## In your own loop\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def names_of_blocks(model: Any, folder: Path) -> dict[str, Any]:
    """The names that the blocks use."""
    ids = torch.randint(5, len(VOCABULARY), (16, 8), generator=torch.Generator().manual_seed(1))
    full: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}
    arguments = TrainingArguments(str(folder), max_steps=4, per_device_train_batch_size=4, report_to="none",
                                  use_cpu=True, disable_tqdm=True, save_strategy="no")  # fmt: skip
    return {
        "model": model.train(),
        "teacher": copy.deepcopy(model).eval(),
        "batches": [{key: value[start : start + 4] for key, value in full.items()} for start in range(0, 16, 4)],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "rows": [{key: value[row] for key, value in full.items()} for row in range(16)],
        "arguments": arguments,
    }


def test_the_first_block_is_ten_lines_and_two_imports() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert lines[:2] == ["import copy", "import sqat"]
    assert len(lines) == 12
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("number", range(4))
def test_every_block_runs(number: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = names_of_blocks(model, tmp_path)
    exec(compile(BLOCKS[number], f"README block {number + 1}", "exec"), names)
    masks = names["masks"].kept
    assert len(masks) == 6
    assert set(model.state_dict()) == set(before)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all())
        assert int(torch.count_nonzero(weight[~mask])) == 0
    if number == 0:
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 6
    assert number == 3 or not torch.equal(weight, before[f"{name}.weight"] * mask)  # it was trained
    assert number != 3 or model.bert.encoder.layer[0].attention.self.value.weight.grad is not None
