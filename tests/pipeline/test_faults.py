"""Faults on purpose, a few of some kinds; `scripts/fault_harness` tries hundreds, kills and signals among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sqat import pipeline
from sqat.errors import SqatError
from sqat.recipe_file import load_recipe

from .conftest import Lines, Project

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[2]


def test_a_few_faults_leave_nothing_broken(tmp_path: Path) -> None:
    known = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    report = tmp_path / "faults.json"
    command = [sys.executable, "-m", "faults", "--short", "--steps", "4", "--json", str(report),
               "--kinds", "double,lock-out,damage"]  # fmt: skip
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert [(kind["kind"], kind["done"], kind["violations"]) for kind in found["kinds"]] == [
        ("two runs in one folder", 2, []), ("read-only folder", 1, []), ("damaged files", 4, []),
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.yaml", "config.json"])
def test_a_damaged_checkpoint_is_not_unchanged(copy: Project, file: str) -> None:
    damaged = next(
        path for path in (copy.stage("prune") / file, copy.stage("prune") / "tokenizer.json") if path.exists()
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(SqatError, match=f"{damaged.name}: the content is not what the manifest's sha256 says"):
        pipeline.run(load_recipe(copy.recipe), Lines())


def test_a_damaged_manifest_is_said_and_its_stage_runs_again(copy: Project) -> None:
    (copy.stage("prune") / "sqat.json").write_text("{")
    pipeline.run(load_recipe(copy.recipe), display := Lines(), last="prune")
    assert display.lines[1] == f"prune: what is in {copy.stage('prune')} is no sound checkpoint: it is made again"
