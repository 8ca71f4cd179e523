"""A tiny real pipeline on scikit-learn's digits, run in forks that can be killed, and what must hold of its folder.

A fork has torch imported already, and the traced float graph of weights that were exported before is remembered, so
that a trial takes as long as its stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sqat import cli, pipeline  # noqa: F401  (imported once, for all forks)
from sqat.checkpoint.store import load_checkpoint
from sqat.errors import SqatError
from sqat.export import source
from sqat.export.graph import export_float

RECIPE = """model:
  config: {model_type: vit, image_size: 8, patch_size: 2, num_channels: 1, hidden_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2, intermediate_size: 64, hidden_dropout_prob: 0.1}
task: image-classification
output: OUTPUT
data: {train: train.npz, dev: dev.npz, test: test.npz, columns: {image: x, label: y}, augment: {shift: 1}}
stages:
  train: {steps: STEPS, learning_rate: 5.0e-3, save_every: 0, evaluate_every: 10, keep_checkpoint: best}
  prune: {steps: STEPS, learning_rate: 2.0e-3, save_every: 0.05, distill: {loss: minilm-v2}}
  calibrate: {samples: 128}
  qat: {steps: STEPS, learning_rate: 1.0e-3, save_every: 0, distill: {loss: minilm-v2}}
  export: {targets: [onnx-int8], max_disagreement: 1.0}
"""
STAGES = ("train", "prune", "calibrate", "qat", "export")
LIMIT = 300.0  # seconds after which a run hangs


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: the signal), what it wrote, seconds."""

    code: int
    error: str
    seconds: float

    @property
    def is_clear(self) -> bool:
        """One line that is no traceback."""
        return self.error.count("\n") == 1 and "Traceback" not in self.error and "internal error" not in self.error


@dataclass
class Running:
    """A run in a fork."""

    pid: int
    error: Path
    begun: float

    def wait(self, limit: float = LIMIT) -> Ended | None:
        """How it ended, or None after ``limit`` seconds."""
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                text = self.error.read_text(errors="replace")
                return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - self.begun)
            if time.monotonic() - self.begun >= limit:
                return None
            time.sleep(0.002)

    def end(self) -> Ended:
        """How it ended; one that hangs is killed."""
        ended = self.wait()
        if ended is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return Ended(-999, "it hangs\n", LIMIT)
        return ended


class Project:
    """Data, a recipe and the run folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        torch.set_num_threads(1)
        self.folder, self.runs = folder, folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        digits = load_digits()
        images = np.minimum(digits.images * 16, 255).astype(np.uint8)
        for name, rows in {"train": slice(0, 256), "dev": slice(256, 352), "test": slice(352, 448)}.items():
            np.savez(folder / f"{name}.npz", x=images[rows], y=digits.target[rows].astype(np.int64))
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE.replace("STEPS", str(steps)).replace("OUTPUT", str(self.runs)))
        self.started = 0
        source.export_float = partial(remembered, folder / "traces")  # type: ignore[attr-defined]

    @property
    def run_folder(self) -> Path:
        return self.runs / "tiny"

    def start(self, *arguments: str, before: Callable[[], object] | None = None) -> Running:
        """Begin ``sqat run`` in a fork of its own; ``before`` is done there first."""
        self.started += 1
        error = self.folder / f"error-{self.started % 8}.txt"
        command = ["run", str(self.recipe), "--quiet", "--no-rehearsal", *arguments]
        begun, pid = time.monotonic(), os.fork()
        if pid:
            return Running(pid, error, begun)
        become_sqat(command, error, before)
        raise AssertionError("a fork never returns")

    def run(self, *arguments: str, before: Callable[[], object] | None = None) -> Ended:
        return self.start(*arguments, before=before).end()

    def clear(self) -> None:
        """Take the run folder away."""
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def stage_reached(self) -> str:
        """The first stage that has no checkpoint yet."""
        done = {path.name[3:] for path in self.run_folder.glob("[0-9][0-9]-*")}
        return next((name for name in STAGES if name not in done), "results")

    def result(self) -> str:
        """All that a run must bring, digested: every file, figure and loss, but no clock reading."""
        facts: dict[str, object] = {}
        for folder in sorted(self.run_folder.glob("[0-9][0-9]-*")):
            manifest = load_checkpoint(folder).manifest
            facts[folder.name] = [manifest.files, manifest.metrics, manifest.losses, manifest.history, manifest.steps]
        results = json.loads((self.run_folder / "results.json").read_text())
        facts["results"] = {label: row["metrics"] for label, row in results.items()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def unsound(self) -> list[str]:
        """What lies under a final name and is not whole."""
        found = [f"half a checkpoint: {fault}" for fault in self.damaged()]
        return found + [
            f"half a state: {file}" for file in self.run_folder.glob(".*.state/state.json") if not is_whole(file)
        ]

    def damaged(self) -> list[str]:
        """What is wrong with the checkpoints under final names."""
        return [fault for folder in sorted(self.run_folder.glob("[0-9][0-9]-*")) if (fault := fault_of(folder))]

    def left_over(self) -> list[str]:
        """Hidden files and folders that a finished run leaves behind."""
        return sorted(path.name for path in self.run_folder.glob(".*"))


def remembered(folder: Path, model: nn.Module, inputs: Mapping[str, Tensor], *names: str) -> ModelProto:
    """What `export_float` says of these weights, traced once; the pipeline has one model and one example."""
    content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    file = folder / f"{hashlib.sha256(content).hexdigest()}.onnx"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        onnx.save(export_float(model, inputs, *names), unfinished)
        unfinished.replace(file)
    return onnx.load(file)


def become_sqat(command: Sequence[str], error: Path, before: Callable[[], object] | None) -> None:
    """Turn a fork into the command; it ends the process."""
    code = 70
    try:
        target = os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        code = cli.main(command)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def is_whole(index: Path) -> bool:
    """Whether a mid-stage state's JSON and the tensors it points to are what it says."""
    try:
        known = json.loads(index.read_bytes())
        content = (index.parent / known["file"]).read_bytes()
        digest = hashlib.sha256(content + json.dumps(known["progress"]).encode()).hexdigest()
    except (OSError, ValueError, KeyError):
        return False
    return bool(digest == known["sha256"])


def fault_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where it verifies."""
    try:
        load_checkpoint(checkpoint)
    except SqatError as error:
        return str(error)
    return ""
