"""scripts/benchmarks/training: ratios within rounds, and candidates that do the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.benchmarks import training_steps as steps
from scripts.benchmarks.training import MISSING, main
from scripts.benchmarks.training_rows import Group, Report, Row, memory_row, rows_of, table, time_group
from sqat.quantization.fake_quant import fake_quantize, fake_quantize_weight
from sqat.sparsity.masks import nm_mask
from tests.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small encoder as a recipe's model.source would name it."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, words=[f"w{i}" for i in range(40)], num_hidden_layers=1)
    return str(folder)


def test_a_ratio_is_of_turns_of_one_round() -> None:
    times = {"dense": [10.0, 20.0, 100.0], "qat": [11.0, 22.0, 90.0]}  # the ratio of the medians would be the same
    dense, qat = rows_of(times, {"qat": "1.05"})
    assert (dense.ratio, dense.against, dense.goal) == (1.0, "dense", "")
    assert (qat.median_ms, qat.ratio, qat.low, qat.high, qat.goal) == (22.0, 1.1, 0.9, 1.1, "1.05")
    slow = rows_of({"a": [1.0, 1.0, 9.0], "b": [3.0, 2.0, 9.0]}, {})[1]
    assert (slow.median_ms, slow.ratio) == (3.0, 2.0)


def test_every_candidate_has_one_turn_in_each_round_and_the_first_is_not_kept() -> None:
    now, order = [0.0], []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds if order.count(name) > 1 else 100.0

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}
    assert time_group(Group(calls, {}), 4, clock=lambda: now[0]) == {"a": [1e3] * 4, "b": [3e3] * 4}
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 10, 2))


def test_the_table_names_what_is_missing() -> None:
    rows = [Row("dense", 900.4, None, 1.0, 1.0, 1.0, "dense"),
            Row("qat", 950.0, None, 1.055, 1.041, 1.07, "dense", "1.05"),
            memory_row("memory", 110.0, 100.0, "least", "1.25")]  # fmt: skip
    lines = table(Report("CPU", 2, [0.1, 0.2], "16x64", 9, {}, [MISSING], rows)).splitlines()
    assert lines[2:5] == ["| dense | 900 |  | 1 |  |  |  |",
                          "| qat | 950 |  | 1.055 | 1.041 to 1.070 | dense | 1.05 |",
                          "| memory |  | 110 | 1.100 |  | least | 1.25 |"]  # fmt: skip
    assert lines[-1] == f"{MISSING}."


def test_rows_of_a_small_model(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    words = ["--only", "steps", "calibration", "--model", folder, "--shape", "4x8", "--rounds", "2"]
    assert main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["name"], row["against"]) for row in found["rows"]] == [
        *((name, "dense step") for name in ("dense step", "prune step", "QAT step", "QAT step with MiniLM v2")),
        *((f"QAT step, dense{more}", "dense step") for more in ("", ", torch's fused quantizers")),
        *((f"{name} of 4 batches", "forward pass of 4 batches") for name in ("forward pass", "calibration")),
    ]
    assert all(row["median_ms"] > 0 and 0 < row["low"] <= row["ratio"] <= row["high"] for row in found["rows"])


def test_the_candidates_do_the_same_work() -> None:
    torch.manual_seed(0)
    x, weight, amax = torch.randn(8, 64), torch.randn(16, 64), torch.tensor(2.0)
    with steps.fused_quantizers():
        from sqat.modules import activation_quantizers as quantizers
        from sqat.modules import parametrize as weights

        torch.testing.assert_close(quantizers.fake_quantize(x, amax), fake_quantize(x, amax))
        torch.testing.assert_close(weights.fake_quantize_weight(weight, None), fake_quantize_weight(weight, None))
    assert torch.equal(steps.mask_by_topk(weight), nm_mask(weight.abs(), steps.TWO_OF_FOUR))


def test_a_step_holds_masks_and_trains(folder: str) -> None:
    model = steps.load_model(folder)
    batch, masks = steps.random_batch(model, (4, 8)), steps.masks_of(model)
    before = {name: steps.get_layer(model, name).weight.detach().clone() for name in masks}
    step = steps.Step(
        steps.quantize_(model, steps.calibrate(model, [batch.inputs]), masks), steps.task_loss(steps.TASK), batch
    )
    step()
    for name, mask in masks.items():
        weight = steps.get_layer(model, name).weight.detach()
        assert not weight[~mask].any(), name
        assert not torch.equal(model.get_submodule(name).parametrizations.weight.original, before[name]), name


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no rows")
    assert main(["--table", str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err.endswith("text: holds no rows of this benchmark; name what --json wrote\n")
