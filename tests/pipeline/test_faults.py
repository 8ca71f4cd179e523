"""What is unchanged is verified; `scripts/faults/harness` breaks more, and for longer."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from sqat.errors import SqatError, StoppedError
from sqat.pipeline import runner as pipeline
from sqat.recipe.loader import load_recipe
from tests.tiny import Project, Recorder

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.yaml", "config.json"])
def test_a_damaged_checkpoint_is_not_unchanged(copy: Project, file: str) -> None:
    damaged = next(
        path for path in (copy.stage("prune") / file, copy.stage("prune") / "tokenizer.json") if path.exists()
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(SqatError, match=f"{damaged.name}: the content is not what the manifest's sha256 says"):
        pipeline.run(load_recipe(copy.recipe), Recorder())


def test_a_stage_with_a_damaged_manifest_runs_again(copy: Project) -> None:
    (copy.stage("prune") / "sqat.json").write_text("{")
    pipeline.run(load_recipe(copy.recipe), reporter := Recorder(), last="prune")
    assert reporter.lines[1] == f"prune: {copy.stage('prune')} holds no valid checkpoint; running the stage again"


class Signalled(Recorder):
    """Gets a signal at the third step."""

    def advance(self, step: int, values: Any, rate: float) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)


AFRESH = "damaged, or written by another configuration; restarting the stage"


@pytest.mark.parametrize(("rate", "message"), [("3.0e-4", "prune: resumed at step 3 of 20"), ("2.0e-4", AFRESH)])
def test_a_state_of_another_recipe_is_not_resumed(copy: Project, rate: str, message: str) -> None:
    """One of another number of processes is (`tests/test_distributed.py`)."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    with pytest.raises(StoppedError):
        pipeline.run(load_recipe(copy.recipe, ["stages.prune.learning_rate=3.0e-4"]), Signalled(), last="prune")
    pipeline.run(load_recipe(copy.recipe, [f"stages.prune.learning_rate={rate}"]), reporter := Recorder(), last="prune")
    assert any(message in line for line in reporter.lines)
