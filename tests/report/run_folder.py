"""A run folder as the pipeline leaves it, with made-up figures, and its page as elements."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from sqat.checkpoint.manifest import load_manifest
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.training.metrics_log import MetricsLog
from tests.bench.graphs import CONFIG, save, write_classifier

RECIPE = """\
# what <this> is & why
model: {source: tiny}
task: classification
data: {train: train.jsonl, dev: dev.jsonl}
stages:
  train: {steps: 10}
  prune: {steps: 10, schedule: {name: per-group, num_masks: 2}, gates: {accuracy: {max_drop: 0.5}}}
  calibrate:
  qat: {steps: 5}
  export: {targets: [onnx-fp32, onnx-int8]}
results: {"dense <b>fp32</b>": export/onnx-fp32, sparse $int8$: export/onnx-int8}
"""
LOSSES = {"train": (5, {"task": 1.5}), "prune": (4, {"task": 0.7, "minilm": 0.01})}
EMPTY = {"area", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page as its elements, with those that are opened and closed counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in EMPTY else [tag]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def write_linear(path: Path) -> Path:
    """A graph of one product, which a linter has something to say of."""
    weight = numpy_helper.from_array(np.ones((32, 32), np.float32), "w")
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32]) for name in ("x", "logits")]
    node = helper.make_node("MatMul", ["x", "w"], ["logits"], name="linear")
    return save(helper.make_graph([node], "g", entries[:1], entries[1:], [weight]), path, {})


def write_run(tmp_path: Path, make_checkpoint: Callable[..., Checkpoint]) -> Path:
    """Write the folder of a run of every stage."""
    folder = tmp_path / "runs" / "a <run>"
    made = make_checkpoint()
    plain: dict[str, Any] = {"layers": {}, "sites": {}, "placement": ""}
    fitted = {"losses": {"task": 0.25}, "steps": 10}
    history = [{"step": 5.0, "accuracy": 0.5}, {"step": 10.0, "accuracy": 0.75}]
    parts: dict[str, dict[str, Any]] = {
        "train": {"type": "train", **plain, **fitted, "history": history, "metrics": {"dev": {"accuracy": 0.75}}},
        "prune": {
            "type": "prune",
            "sites": {},
            "placement": "",
            "losses": {"task": 0.5, "minilm": 0.01},
            "steps": 10,
            "metrics": {"dev": {"accuracy": 0.125}},
        },
        "calibrate": {"type": "calibrate"},
        "qat": {"type": "qat", "losses": {"task": 0.2}, "steps": 5},
    }
    histogram = {"width": 0.5, "counts": [70, 20, 8, 2], "covers": 1.75}
    seen = json.dumps(dict.fromkeys(made.manifest.sites, histogram)).encode()
    for number, (name, entries) in enumerate(parts.items(), 1):
        manifest = made.manifest.model_copy(update={"stage": name, **entries})
        bare = {"masks": {}, "amax": {}} if name == "train" else {"amax": {}} if name == "prune" else {}
        files = {**made.files, **({"histograms.json": seen} if name == "calibrate" else {})}
        whole = replace(made, manifest=manifest, recipe=RECIPE, files=files, **bare)
        save_checkpoint(whole, folder / f"{number:02d}-{name}")
    linear, scores = write_linear(tmp_path / "l.onnx"), write_classifier(tmp_path / "c.onnx")
    files = {"model.fp32.onnx": linear.read_bytes(), "model.int8.onnx": scores.read_bytes()}
    files["config.json"] = json.dumps(CONFIG).encode()
    manifest = made.manifest.model_copy(update={"stage": "export", "type": "export", "notes": ["<i>note</i>"], **plain})
    save_checkpoint(Checkpoint(manifest, files, recipe=RECIPE), folder / "05-export")
    for stage, (step, losses) in LOSSES.items():
        MetricsLog(folder / "metrics.jsonl", stage, made.manifest.fingerprint).write(step, losses, 1e-3)
    key = load_manifest(folder / "05-export").sha256
    figures = {"dense <b>fp32</b>": 0.8, "sparse $int8$": 0.76}
    rows = {label: {"key": f"{key}/x/y", "split": "dev", "data": "d" * 64, "metrics": {"f1": 0.1, "accuracy": value}}
            for label, value in figures.items()}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "latency.json").write_text(json.dumps(latency(list(figures))))
    return folder


def latency(labels: list[str]) -> dict[str, Any]:
    """`latency.json`: the second row twice as fast as the first."""
    ratio = {"median": 2.0, "low": 1.9, "high": 2.125}
    rows = {label: {"cpu_ms": 8.0 / (1 + number), "cpu_p95_ms": 9.5, "cpu_against": {labels[0]: ratio}}
            for number, label in enumerate(labels)}  # fmt: skip
    settings = [{"batch": 8, "sequence": 64, "rounds": 20, "rows": rows}]
    return {"threads": 1, "cpu": "a <CPU>", "load": 0.5, "settings": settings}
