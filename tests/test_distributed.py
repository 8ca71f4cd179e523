"""Several processes share a fit: the same result as one, bit for bit where nothing is added up, and resumed by others.

The processes run once for all tests (`tests/crowd.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sqat.distributed import raise_on_lost_peer
from sqat.errors import SqatError
from sqat.quantization.histogram import Histogram
from sqat.training.batches import seed_torch
from tests.crowd import GROUPS, LAYERS, LIMIT, STEPS, STOP, batches_of

ROOT = Path(__file__).parents[1]
WORLDS = ("2", "4", "shards")
Crowd = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    """Group -> what each of its processes ended with."""
    folder = tmp_path_factory.mktemp("crowd")
    done = subprocess.run([sys.executable, "-m", "tests.crowd", str(folder)], cwd=ROOT, text=True, timeout=LIMIT + 30,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {group: [torch.load(folder / f"{group}-{rank}.pt") for rank in range(world)]
            for group, (world, _) in GROUPS.items()}  # fmt: skip


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Equal but for the rounding of sums, which six steps of Adam carry on."""
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5) for name in theirs)


def equal(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit, in whatever dictionaries and lists."""
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    return bool(ours == theirs)


@pytest.mark.parametrize("group", WORLDS)
@pytest.mark.parametrize("loss", ["fit", "hidden"])
def test_processes_that_share_the_batches_train_what_one_would(group: str, loss: str, crowd: Crowd) -> None:
    """With dropout, noise in the data, batches of unequal size, accumulation and masks."""
    alone, ours = crowd["1"][0][loss], crowd[group][0][loss]
    assert close(ours["weights"], alone["weights"])
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert ours["score"] == pytest.approx(alone["score"], rel=1e-4, abs=1e-5)
    assert equal(ours["masks"], alone["masks"])
    assert list(ours["masks"]) == list(LAYERS)
    assert ours["samples"] == alone["samples"]
    assert len(set(alone["losses"])) == STEPS
    world = len(crowd[group])
    how = " that share the model out (FSDP)" if group == "shards" else ""
    assert ours["said"] == [f"crowd: {world} processes{how}, an optimizer step sums up 4 batches"]


@pytest.mark.parametrize("group", [*WORLDS, "3 again"])
def test_all_processes_hold_the_same(group: str, crowd: Crowd) -> None:
    first, *others = crowd[group]
    fits = ("fit", "hidden") if "fit" in first else ("1", "2", "4", "shards")
    assert all(equal(other[name], {**first[name], "said": other[name]["said"]}) for other in others for name in fits)


@pytest.mark.parametrize(("before", "after"), [("1", "1 again"), ("2", "2 again"), ("shards", "shards again")])
def test_as_many_processes_go_on_to_the_same_bits(before: str, after: str, crowd: Crowd) -> None:
    whole, gone_on = crowd[before][0]["fit"], crowd[after][0][before]
    assert gone_on["said"][0].startswith("crowd: resumed at step 2 of 6")
    assert equal(gone_on["weights"], whole["weights"])
    assert gone_on["losses"] == whole["losses"][2:]
    assert gone_on["score"] == whole["score"]


@pytest.mark.parametrize("after", ["1 again", "2 again", "3 again", "shards again"])
@pytest.mark.parametrize("before", ["1", "2", "4", "shards"])
def test_another_number_of_processes_goes_on_to_the_same_result(before: str, after: str, crowd: Crowd) -> None:
    """Three processes have four batches a step: the one without a second batch must not count."""
    whole, gone_on = crowd["1"][0]["fit"], crowd[after][0][before]
    assert close(gone_on["weights"], whole["weights"])
    assert gone_on["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)
    assert gone_on["samples"] == whole["samples"]
    told = gone_on["said"][0].replace(" that share the model out (FSDP)", "")
    assert told.startswith("crowd: resumed at step 2 of 6")
    kept = "3 processes, an optimizer step sums up 4 batches as when it began, not 3"
    assert told.endswith(kept) == (after == "3 again")


@pytest.mark.parametrize("group", ["2", "4"])
def test_statistics_histograms_and_logits_are_those_of_one_process(group: str, crowd: Crowd) -> None:
    alone = crowd["1"][0]
    for ours in crowd[group]:
        for name in ("sums", "histograms", "scales", "logits"):
            assert equal(ours[name], alone[name]), name


@pytest.mark.parametrize("group", ["2", "4"])
def test_batch_norms_see_what_those_of_one_process_do(group: str, crowd: Crowd) -> None:
    alone = crowd["1"][0]["norm"]
    for process in crowd[group]:
        for steps, known in alone.items():
            assert int(process["norm"][steps]["norm.num_batches_tracked"]) == steps
            for name, buffer in known.items():
                torch.testing.assert_close(process["norm"][steps][name], buffer)


@pytest.mark.parametrize("group", ["2", "4"])
def test_blocks_learn_in_processes_what_they_learn_in_one(group: str, crowd: Crowd) -> None:
    alone, (first, *others) = crowd["1"][0]["blocks"], [process["blocks"] for process in crowd[group]]
    assert all(after < before for before, after in alone["errors"])
    assert close(first["weights"], alone["weights"])
    assert first["errors"] == [pytest.approx(errors, rel=1e-3) for errors in alone["errors"]]
    assert all(equal(other, first) for other in others)


def test_a_batch_norm_moves_once_a_step_by_the_mean_of_its_batches(crowd: Crowd) -> None:
    """The oracle adds up four batches in float64."""
    batches, mean, var, rows = batches_of(24, 5), torch.zeros(8), torch.zeros(8), 0
    for number, indices in enumerate(batches.plan(0)[:4]):
        seed_torch(3, number, 0)
        x = batches.collate(indices).inputs["input_ids"].double()
        mean, var, rows = mean + len(x) * x.mean(0), var + len(x) * x.var(0), rows + len(x)
    found = crowd["1"][0]["norm"][1]
    torch.testing.assert_close(found["norm.running_mean"].double(), 0.1 * mean / rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["norm.running_var"].double(), 0.9 + 0.1 * var / rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", ["1", "2", "4"])
def test_all_processes_tell_that_the_first_cannot_save(group: str, crowd: Crowd) -> None:
    for process in crowd[group]:
        assert process["full"]["step"] == STOP - 1  # the last state that could be written, whole
        assert process["full"]["told"].endswith(f"{group}-full: the mid-stage state cannot be written: "
                                                "File too large; free space")  # fmt: skip


def test_the_oracles_of_what_is_shared(crowd: Crowd) -> None:
    alone, rows = crowd["1"][0], torch.arange(150)
    assert torch.equal(alone["logits"], torch.stack([rows.sin(), rows.cos()], dim=1))
    seen = Histogram()
    for number in range(6):
        seen.observe(torch.randn(500, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number - 3))
    assert equal(alone["histograms"]["a"], vars(seen))
    assert [process["indices"] for process in crowd["4"]] == [[(0, True)], [(1, True)], [(2, True)], [(0, False)]]
    assert [process["indices"] for process in crowd["2"]] == [[(0, True), (2, True)], [(1, True), (0, False)]]


def test_only_a_broken_connection_to_another_rank_is_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("[gloo] Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed by peer"), raise_on_lost_peer():
        raise broken  # this run has one rank
    with pytest.raises(SqatError, match="of the user"), raise_on_lost_peer():
        raise SqatError("of the user", code="usage")
    monkeypatch.setattr("sqat.distributed.process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(SqatError) as error, raise_on_lost_peer():
        raise broken
    assert error.value.code == "lost-process"
