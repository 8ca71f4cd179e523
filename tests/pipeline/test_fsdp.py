"""A recipe with FSDP computes what replicas and one process compute, and resumes after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sqat.checkpoint.store import Checkpoint, load_checkpoint

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[2]
STAGES = ("01-train", "02-prune", "03-calibrate", "04-qat")
Runs = dict[str, dict[str, Checkpoint]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.pipeline.fsdp_runs` has run."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = subprocess.run([sys.executable, "-m", "tests.pipeline.fsdp_runs", str(folder)], cwd=ROOT, text=True,
                          timeout=600, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """Run -> stage -> its checkpoint."""
    names = ("alone", "replicas", "sharded", "resumed")
    return {name: {path.name: load_checkpoint(path) for path in (folder / name / "runs/tiny").glob("??-*")}
            for name in names}  # fmt: skip


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Equal but for the rounding of sums, which some steps of Adam carry on."""
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=5e-5) for name in theirs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", ["replicas", "alone"])
def test_fsdp_computes_what_whole_models_compute(other: str, stage: str, runs: Runs) -> None:
    ours, theirs = runs["sharded"][stage], runs[other][stage]
    assert ours.weights
    assert close(ours.weights, theirs.weights)
    assert list(ours.masks) == list(theirs.masks)
    assert all(torch.equal(ours.masks[name], mask) for name, mask in theirs.masks.items())
    assert ours.manifest.metrics == theirs.manifest.metrics
    assert len(ours.masks) == (0 if stage == "01-train" else 12)


@pytest.mark.parametrize("other", ["replicas", "alone"])
def test_histograms_differ_only_in_values_at_the_edge_of_a_bin(other: str, runs: Runs) -> None:
    ours, theirs = (json.loads(runs[name]["03-calibrate"].files["histograms.json"]) for name in ("sharded", other))
    assert list(ours) == list(theirs)
    for site, expected in theirs.items():
        moved = sum(abs(a - b) for a, b in zip(ours[site]["counts"], expected["counts"], strict=True))
        assert ours[site]["width"] == expected["width"]
        assert sum(ours[site]["counts"]) == sum(expected["counts"])
        assert moved <= 0.01 * sum(expected["counts"]), site


def test_two_or_one_process_resume_after_a_kill(folder: Path, runs: Runs) -> None:
    exit_codes = json.loads((folder / "exit_codes.json").read_text())
    assert (exit_codes["killed"], exit_codes["sharded"], exit_codes["resumed"]) == ([2, -9], [0, 0], [0])
    lost = (folder / "sharded/killed").read_text()
    assert lost.count("error: another process of this run has ended") == 1
    how = "2 processes that share the model out (FSDP), an optimizer step sums up 2 batches"
    assert how in lost
    outputs = {name: (folder / name / "output0").read_text() for name in ("sharded", "resumed")}
    for name, text in outputs.items():
        assert "prune: resumed at step" in text
        assert (how in text) == (name == "sharded")
    assert close(runs["resumed"]["02-prune"].weights, runs["sharded"]["02-prune"].weights)
    assert runs["resumed"]["02-prune"].masks.keys() == runs["sharded"]["02-prune"].masks.keys()
    for name, mask in runs["resumed"]["02-prune"].masks.items():
        assert torch.equal(mask, runs["sharded"]["02-prune"].masks[name])


def test_all_ranks_report_that_rank_0_has_no_room(folder: Path) -> None:
    assert json.loads((folder / "exit_codes.json").read_text())["full"] == [2, 2]
    for rank in (0, 1):
        *_, last = (folder / f"full/output{rank}").read_text().splitlines()
        assert "/01-train: cannot be written: " in last
        assert "File too large" in last
    assert {path.name for path in (folder / "full/runs/tiny").iterdir()} == {
        "metrics.jsonl",
        "rehearsed.json",
        "sqat.log",
    }
