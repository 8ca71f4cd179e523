"""A whole recipe whose processes share the model out (FSDP) comes to what replicas and what one process come to."""

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
    """Where `tests.pipeline.shares` has run."""
    folder = tmp_path_factory.mktemp("shares")
    done = subprocess.run([sys.executable, "-m", "tests.pipeline.shares", str(folder)], cwd=ROOT, text=True,
                          timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """Run -> stage -> its checkpoint."""
    names = ("alone", "replicas", "shares", "one")
    return {name: {path.name: load_checkpoint(path) for path in (folder / name / "runs/tiny").glob("??-*")}
            for name in names}  # fmt: skip


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Equal but for the rounding of sums, which some steps of Adam carry on."""
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=5e-5) for name in theirs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", ["replicas", "alone"])
def test_shares_come_to_what_whole_models_come_to(other: str, stage: str, runs: Runs) -> None:
    ours, theirs = runs["shares"][stage], runs[other][stage]
    assert ours.weights
    assert close(ours.weights, theirs.weights)
    assert list(ours.masks) == list(theirs.masks)
    assert all(torch.equal(ours.masks[name], mask) for name, mask in theirs.masks.items())
    assert ours.manifest.metrics == theirs.manifest.metrics
    assert len(ours.masks) == (0 if stage == "01-train" else 12)


@pytest.mark.parametrize("other", ["replicas", "alone"])
def test_their_histograms_are_the_same_but_for_values_at_the_edge_of_a_bin(other: str, runs: Runs) -> None:
    ours, theirs = (json.loads(runs[name]["03-calibrate"].files["histograms.json"]) for name in ("shares", other))
    assert list(ours) == list(theirs)
    for site, known in theirs.items():
        moved = sum(abs(a - b) for a, b in zip(ours[site]["counts"], known["counts"], strict=True))
        assert ours[site]["width"] == known["width"]
        assert sum(ours[site]["counts"]) == sum(known["counts"])
        assert moved <= 0.01 * sum(known["counts"]), site


def test_one_of_two_is_killed_and_two_or_one_go_on(folder: Path, runs: Runs) -> None:
    ended = json.loads((folder / "ends.json").read_text())
    assert (ended["killed"], ended["shares"], ended["one"]) == ([2, -9], [0, 0], [0])
    lost = (folder / "shares/killed").read_text()
    assert lost.count("error: another process of this run has ended") == 1
    how = "2 processes that share the model out (FSDP), an optimizer step sums up 2 batches"
    assert how in lost
    said = {name: (folder / name / "said0").read_text() for name in ("shares", "one")}
    for name, text in said.items():
        assert "prune: resumed at step" in text
        assert (how in text) == (name == "shares")
    assert close(runs["one"]["02-prune"].weights, runs["shares"]["02-prune"].weights)
    assert runs["one"]["02-prune"].masks.keys() == runs["shares"]["02-prune"].masks.keys()
    for name, mask in runs["one"]["02-prune"].masks.items():
        assert torch.equal(mask, runs["shares"]["02-prune"].masks[name])


def test_both_tell_that_the_first_has_no_room_for_a_checkpoint(folder: Path) -> None:
    assert json.loads((folder / "ends.json").read_text())["full"] == [2, 2]
    for rank in (0, 1):
        *_, last = (folder / f"full/said{rank}").read_text().splitlines()
        assert last.endswith("/01-train: cannot be written: File too large; free space or choose another folder")
    assert {path.name for path in (folder / "full/runs/tiny").iterdir()} == {"metrics.jsonl", "sqat.log"}
