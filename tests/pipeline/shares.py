"""A whole recipe by one process, by two with a replica each, and by two with shares, one of which is killed on the way.

A script, ``python -m tests.pipeline.shares FOLDER``: each run has a folder of its own there, ``alone``, ``replicas``,
``shares`` and ``one``, which goes on alone from what ``shares`` left when it was killed, and ``full``, of two whose
first has no room for a checkpoint. What a process said is in ``said0`` or ``said1`` beside its recipe, and the exit
codes are in ``FOLDER/ends.json``. Left out: the export, which every process makes by itself and shares no work of.
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
  train: {steps: 24, learning_rate: 3.0e-3, batch_size: 16, gradient_accumulation: TOGETHER}
  prune: {steps: 8, learning_rate: 5.0e-4, batch_size: 8, gradient_accumulation: TOGETHER, save_every: 0,
          criterion: {name: taylor, samples: 32}, distill: {loss: minilm-v1}}
  calibrate: {placement: tensorrt, samples: 32, batch_size: 8}
  qat: {steps: 6, learning_rate: 2.0e-4, batch_size: 8, gradient_accumulation: TOGETHER}
"""
KILLED_AT, LONGEST = 2, 60.0  # step of the prune stage; seconds until then
ROOM = 60_000  # bytes: more than the news of a run, less than its model


def write_recipe(project: Path, together: int) -> None:
    """The project's recipe with these stages, of which a process takes ``together`` batches a step."""
    recipe = project / "tiny.yaml"
    head = recipe.read_text().partition("stages:")[0].partition("output:")[0]
    data = "data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}\n"
    recipe.write_text(f"{head}output: {project / 'runs'}\n{data}{STAGES.replace('TOGETHER', str(together))}")


def work(project: Path, *options: str, room: int | None = None) -> Callable[[int], None]:
    """What each process of a group does: the command, whose exit code becomes its own.

    Args:
        room: bytes that a file of the first process may have.
    """

    def run(rank: int) -> None:
        target = os.open(project / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
    """Kill the second process once the prune stage has saved a state; SystemExit where it never does."""
    state, begun = project / "runs/tiny/.02-prune.state/state.json", time.monotonic()
    while time.monotonic() - begun < LONGEST:
        if state.exists() and json.loads(state.read_bytes())["progress"]["step"] >= KILLED_AT:
            forks.kill(children[1])
            return
        time.sleep(0.005)
    sys.exit("the prune stage has saved no state")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    write_project(folder / "alone")
    for name, together in {"alone": 2, "replicas": 1, "shares": 1, "full": 1}.items():
        if name != "alone":
            shutil.copytree(folder / "alone", folder / name)
        write_recipe(folder / name, together)
    ended = {"alone": forks.ends(forks.start(1, work(folder / "alone")))}
    ended["replicas"] = forks.ends(forks.start(2, work(folder / "replicas")))
    ended["full"] = forks.ends(forks.start(2, work(folder / "full", room=ROOM)))
    children = forks.start(2, work(folder / "shares"), shards=True)
    kill_in_prune(children, folder / "shares")
    ended["killed"] = forks.ends(children)
    (folder / "shares/said0").rename(folder / "shares/killed")
    shutil.copytree(folder / "shares", folder / "one")
    write_recipe(folder / "one", 1)
    ended["shares"] = forks.ends(forks.start(2, work(folder / "shares"), shards=True))
    ended["one"] = forks.ends(forks.start(1, work(folder / "one", "--to", "prune")))
    (folder / "ends.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
