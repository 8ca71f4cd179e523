"""Run one recipe in several ways: ``python -m tests.pipeline.fsdp_runs FOLDER``.

Each run has a folder: ``alone`` (one process), ``replicas`` (two), ``sharded`` (two with FSDP, one of which is killed
and both resume), ``resumed`` (one process resumes the killed run) and ``full`` (rank 0 has no room for a checkpoint).
Beside the recipe are the outputs ``output0`` and ``output1``; the exit codes are in ``FOLDER/exit_codes.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from sqat import cli, pipeline  # noqa: F401  (imported once, for all forks)
from sqat.stages import train  # noqa: F401
from tests import forks
from tests.tiny import write_project

STAGES = """stages:
  train: {steps: 24, learning_rate: 3.0e-3, batch_size: 16, gradient_accumulation: ACCUMULATION}
  prune: {steps: 8, learning_rate: 5.0e-4, batch_size: 8, gradient_accumulation: ACCUMULATION, save_every: 0,
          criterion: {name: taylor, samples: 32}, distill: {loss: minilm-v1}}
  calibrate: {placement: tensorrt, samples: 32, batch_size: 8}
  qat: {steps: 6, learning_rate: 2.0e-4, batch_size: 8, gradient_accumulation: ACCUMULATION,
        distill: {hidden_weight: 0.5}}
"""
KILLED_AT, TIMEOUT = 2, 200.0  # step of the prune stage; seconds until then
ROOM = 60_000  # bytes: more than the log of a run, less than its model


def write_recipe(project: Path, accumulation: int) -> None:
    """The project's recipe with these stages, in which a process accumulates this many batches a step."""
    recipe = project / "tiny.yaml"
    head = recipe.read_text().partition("stages:")[0].partition("output:")[0]
    data = "data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}\n"
    recipe.write_text(f"{head}output: {project / 'runs'}\n{data}{STAGES.replace('ACCUMULATION', str(accumulation))}")


def work(project: Path, *options: str, room: int | None = None) -> Callable[[int], None]:
    """Return what each process runs: the command, with its exit code.

    Args:
        room: bytes that a file of the first process may have.
    """

    def run(rank: int) -> None:
        target = os.open(project / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        with nullcontext() if room is None or rank else forks.full_disk(room):
            code = cli.main(["run", str(project / "tiny.yaml"), *options])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return run


def kill_in_prune(children: list[int], project: Path) -> None:
    """Kill the second process once the prune stage has saved a state; SystemExit if it never does."""
    state, start = project / "runs/tiny/.02-prune.state/state.json", time.monotonic()
    while time.monotonic() - start < TIMEOUT:
        if state.exists() and json.loads(state.read_bytes())["progress"]["step"] >= KILLED_AT:
            forks.kill(children[1])
            return
        time.sleep(0.005)
    sys.exit("the prune stage has saved no state")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    write_project(folder / "alone")
    for name, accumulation in {"alone": 2, "replicas": 1, "sharded": 1, "full": 1}.items():
        if name != "alone":
            shutil.copytree(folder / "alone", folder / name)
        write_recipe(folder / name, accumulation)
    exit_codes = {"alone": forks.ends(forks.start(1, work(folder / "alone", "--no-rehearsal")))}
    exit_codes["replicas"] = forks.ends(forks.start(2, work(folder / "replicas", "--no-rehearsal")))
    exit_codes["full"] = forks.ends(forks.start(2, work(folder / "full", room=ROOM)))
    children = forks.start(2, work(folder / "sharded"), shards=True)
    kill_in_prune(children, folder / "sharded")
    exit_codes["killed"] = forks.ends(children)
    (folder / "sharded/output0").rename(folder / "sharded/killed")
    shutil.copytree(folder / "sharded", folder / "resumed")
    write_recipe(folder / "resumed", 1)
    exit_codes["sharded"] = forks.ends(forks.start(2, work(folder / "sharded"), shards=True))
    exit_codes["resumed"] = forks.ends(forks.start(1, work(folder / "resumed", "--to", "prune")))
    (folder / "exit_codes.json").write_text(json.dumps(exit_codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
