"""Run folders with damaged, foreign and linked things in them, for every command that reads or continues a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scripts.faults.fuzzing.case import HOSTILE_TEXTS, Action, cut, flip_bytes
from scripts.faults.fuzzing.manifests import VALUES
from sqat.checkpoint.manifest import MANIFEST, LayerRecord, Manifest, manifest_digest
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.training.metrics_log import MetricsLog

RECIPE = """\
model: {source: model, max_length: 8}
task: classification
data: {train: rows.csv, dev: rows.csv, test: rows.csv}
stages:
  train: {steps: 4}
  prune: {steps: 4, distill: null, gates: {accuracy: {max_drop: 0.5}}}
  calibrate: {}
results: {dense: train, sparse: prune}
"""
RUN, LAYER = "runs/recipe", "encoder.layer.0.output.dense"
STAGES = ("01-train", "02-prune", "03-calibrate")
FILES = (MANIFEST, "config.json", "model.safetensors", "recipe.yaml", "notes.txt", "histograms.json")
PLACES = (".lock", "sqat.log", "metrics.jsonl", "results.json", "latency.json", "bench.json", "run.json", "tracking",
          "report.html", ".01-train.state", ".02-prune.new", ".03-calibrate.old", "02-prune.rejected", *STAGES,
          *(f"{stage}/{name}" for stage in STAGES for name in FILES))  # fmt: skip
TARGETS = ("../../secret", "../../../secret", "/etc/hostname", "/dev/zero", ".", "..", "nowhere", "sqat.log", MANIFEST)
NUMBERS: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    -1,
    0,
    1e308,
    10**299,
    10**400,
    2**63,
    True,
    None,
    "inf",
    "1e999",
    [],
    {},
)


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a run folder with up to four changes; return commands that read it or go on with it."""
    shutil.copytree(sound_project(), folder, dirs_exist_ok=True)
    for _ in range(draw.randint(1, 4)):
        draw.choice(CHANGES)(draw, folder / RUN)
    stage = f"{RUN}/{draw.choice(STAGES)}"
    commands: tuple[Action, ...] = (
        ("report", RUN, "--quiet"),
        ("report", RUN, "--quiet", "--output", f"{RUN}/{draw.choice(PLACES)}"),
        ("run", "recipe.yaml", "--dry-run"),
        ("run", "recipe.yaml", "--quiet"),
        ("train", "recipe.yaml", "--quiet", "--output", f"{RUN}/{draw.choice(PLACES)}"),
        ("prune", "recipe.yaml", "--quiet", "--from", stage),
        ("inspect", stage),
        ("evaluate", "recipe.yaml", stage, "--split", "dev"),
        ("analyze", "recipe.yaml", "--from", stage, "--samples", "4"),
    )
    return draw.sample(commands, 2)


def damage(draw: random.Random, run: Path) -> None:
    """Change bytes of a file, or cut it short."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.is_symlink()]
    if files:
        path = draw.choice(files)
        path.write_bytes(draw.choice((flip_bytes, cut))(draw, path.read_bytes()))


def replace_place(draw: random.Random, run: Path) -> None:
    """Put a link, a pipe, a folder, notes or nothing where a file or folder of ours is expected."""
    path = run / draw.choice(PLACES)
    if path.parent.is_symlink() or not path.parent.is_dir():
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        path.symlink_to(draw.choice(TARGETS))
    if kind == 1:
        os.mkfifo(path)
    if kind == 2:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    if kind == 3:
        path.write_text(draw.choice(HOSTILE_TEXTS).encode("utf-8", "replace").decode())
    if kind == 4:
        path.write_text(draw.choice(("[" * 2000, "{}", "[1]", "null", '{"files": {"../../secret": "1"}}')))


def change_manifest(draw: random.Random, run: Path) -> None:
    """Put other values in a manifest, with a digest that fits them."""
    path = run / draw.choice(STAGES) / MANIFEST
    change_json(draw, path, [*VALUES, *NUMBERS, *HOSTILE_TEXTS], is_manifest=True)


def change_figures(draw: random.Random, run: Path) -> None:
    """Put other values in the results or the latencies."""
    change_json(draw, run / draw.choice(("results.json", "latency.json")), [*NUMBERS, *HOSTILE_TEXTS])


def change_json(draw: random.Random, path: Path, values: Sequence[Any], *, is_manifest: bool = False) -> None:
    """Put other values anywhere in a JSON file, where it is one yet."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 1 << 20 else None
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict) or path.is_symlink():
        return
    for _ in range(draw.randint(1, 3)):
        part: Any = content
        while isinstance(part, dict) and part:
            key = draw.choice([*part])
            if not isinstance(part[key], dict) or draw.random() < 0.3:
                part[key] = draw.choice(values)
                break
            part = part[key]
    if is_manifest:
        content["sha256"] = manifest_digest(content)
    path.write_text(json.dumps(content))


def add_log_lines(draw: random.Random, run: Path) -> None:
    """Append lines of wrong types to what training logged."""
    path = run / "metrics.jsonl"
    if not path.is_symlink() and path.is_file():
        entry = {"stage": "train", "fingerprint": "f", "attempt": 1, "step": draw.choice(NUMBERS),
                 "losses": {draw.choice(HOSTILE_TEXTS): draw.choice(NUMBERS)}}  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


@cache
def sound_project() -> Path:
    """Write a project whose run folder is as a run leaves it, with a model of one layer that no command can build."""
    folder = Path(tempfile.mkdtemp())
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "rows.csv").write_text("text,label\na,x\nb,y\n" * 4)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    weight = torch.ones(8, 8)
    weight[:, ::2] = 0.0
    results: dict[str, Any] = {}
    for number, stage in enumerate(STAGES, 1):
        name: Any = stage.partition("-")[2]
        layers = {LAYER: LayerRecord(pattern="2:4")} if number > 1 else {}
        history = [{"step": 4.0, "accuracy": 0.5}]
        manifest = Manifest(stage=name, type=name, fingerprint="f", base_model="model", seed=0, steps=4, layers=layers,
                            metrics={"dev": {"accuracy": 0.5}}, losses={"task": 0.5}, history=history)  # fmt: skip
        checkpoint = Checkpoint(manifest, {"config.json": b'{"model_type": "bert"}'}, {f"{LAYER}.weight": weight},
                                {LAYER: weight != 0} if number > 1 else {}, recipe=RECIPE)  # fmt: skip
        save_checkpoint(checkpoint, folder / RUN / f"{number:02d}-{name}")
        results[name] = {"key": "k", "split": "test", "data": "d", "metrics": {"accuracy": 0.5}}
    # One stage's curves: a report draws them in a tenth of a second each.
    MetricsLog(folder / RUN / "metrics.jsonl", "train", "f").write(4, {"task": 0.5}, 1e-3)
    ratio = {"median": 2.0, "low": 1.9, "high": 2.1}
    row = {"cpu_ms": 8.0, "cpu_p95_ms": 9.5, "cpu_against": {"dense": ratio}}
    setting = {"batch": 8, "sequence": 64, "rounds": 20, "rows": {"dense": row, "sparse": row}}
    latency = {"threads": 1, "cpu": "c", "load": 0.5, "settings": [setting]}
    (folder / RUN / "results.json").write_text(json.dumps(results))
    (folder / RUN / "latency.json").write_text(json.dumps(latency))
    (folder / RUN / "sqat.log").write_text("2026-01-01 00:00:00 train: 4 steps\n")
    return folder


CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (
    damage, replace_place, replace_place, change_manifest, change_figures, add_log_lines)  # fmt: skip
