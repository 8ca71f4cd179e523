"""Processes of torchrun: one is killed, the others report it and end, and one process resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqat.pipeline import runner as pipeline
from sqat.recipe.loader import load_recipe
from tests.tiny import Project, Recorder

pytestmark = pytest.mark.pipeline
KILLED_AT, TIMEOUT = 3, 120.0  # steps; seconds to wait for it
OVERRIDES = ["stages.prune.learning_rate=4.0e-4", "stages.prune.save_every=0"]


def saved_step(project: Project) -> int:
    """Return the last step that the running prune stage has saved."""
    try:
        state = json.loads((project.folder / "runs/tiny/.02-prune.state/state.json").read_bytes())
    except OSError:
        return 0
    return int(state["progress"]["step"])


def rank_of(process: Path) -> str | None:
    """Return the rank of a process; None where it has none or has ended."""
    try:
        entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return dict(entry.split("=", 1) for entry in entries if "=" in entry).get("RANK")


def find_child(parent: int, rank: str) -> int:
    """Return the process of a rank that torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(number) for number in children if rank_of(Path("/proc") / number) == rank)


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").is_file(), reason="no list of child processes")
def test_a_killed_process_ends_the_run_which_another_number_resumes(copy: Project) -> None:
    settings = [word for override in OVERRIDES for word in ("--set", override)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sqat",
               "run", str(copy.recipe), "--to", "prune", *settings]  # fmt: skip
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        start = time.monotonic()
        while saved_step(copy) < KILLED_AT and run.poll() is None and time.monotonic() - start < TIMEOUT:
            time.sleep(0.01)
        os.kill(find_child(run.pid, "1"), signal.SIGKILL)
        _, stderr = run.communicate(timeout=TIMEOUT)
    finally:
        run.kill()
    assert run.returncode == 1
    assert stderr.count("error: another process of this run has ended") == 1
    hidden = {path.name for path in (copy.folder / "runs/tiny").glob(".*")}
    assert ".02-prune.state" in hidden
    assert hidden <= {".02-prune.state", ".lock"}  # nothing half-written

    pipeline.run(load_recipe(copy.recipe, OVERRIDES), reporter := Recorder(), last="prune")
    assert any(line.startswith("prune: resumed at step") for line in reporter.lines)
    resumed = load_file(copy.stage("prune") / "model.safetensors")
    alone = [*OVERRIDES, "stages.prune.gradient_accumulation=2"]
    pipeline.run(load_recipe(copy.recipe, alone), Recorder(), last="prune")
    expected = load_file(copy.stage("prune") / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=2e-5)
        assert torch.equal(resumed[name] == 0, tensor == 0), name
