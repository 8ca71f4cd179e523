"""A retrieval recipe on a tiny encoder that learns without labels: checkpoints, files and metrics agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from sqat.checkpoint.store import load_checkpoint
from sqat.evaluation.evaluate import evaluate_artifact
from sqat.pipeline.runner import run
from sqat.recipe.loader import load_recipe
from sqat.runtime.sessions import session
from sqat.tasks.splits import Splits
from tests.errors import raises_code
from tests.pipeline.shipped import replace_model, replace_rows, run_shipped
from tests.tiny import Recorder, relevance_rows, write_model, write_rows

STEPS, BATCH = 5, 8
RECIPE = f"""
model: {{source: model, max_length: 16}}
task: {{name: retrieval, negatives: 2}}
data: {{train: train.jsonl, dev: dev.jsonl, test: dev.jsonl, columns: {{group: qid, candidates: candidates}}}}
stages:
  train: {{steps: 0}}
  prune: {{steps: {STEPS}, batch_size: {BATCH}, learning_rate: 1.0e-3, distill: {{task_weight: 0, output_weight: 10}}}}
  calibrate: {{samples: 32}}
  export: {{targets: [onnx-int8, onnx-fp32]}}
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a recipe; train has texts without a query, dev a query without an answer."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("search")
    write_model(folder / "model", "bert")
    rows, dev = relevance_rows(6, 0), relevance_rows(20, 1)
    dev[3]["candidates"] = [candidate | {"label": 0} for candidate in dev[3]["candidates"]]
    loose = [{"text": f"film {word}"} for word in ("a", "of", "to", "in", "is", "it")]
    write_rows(folder / "train.jsonl", [*rows, *loose])
    write_rows(folder / "dev.jsonl", dev)
    (folder / "search.yaml").write_text(RECIPE + f"output: {folder / 'runs'}\n")
    run(load_recipe(folder / "search.yaml"), Recorder())
    return folder


def stage(folder: Path, name: str) -> Path:
    return next((folder / "runs" / "search").glob(f"??-{name}"))


def test_the_pretrained_model_teaches_and_every_text_is_a_row(searched: Path) -> None:
    dense, sparse = load_checkpoint(stage(searched, "train")), load_checkpoint(stage(searched, "prune"))
    assert (dense.manifest.steps, sparse.manifest.steps) == (0, STEPS)
    assert sparse.manifest.samples == 6 * (1 + 4) + 6  # one epoch: every text once
    assert set(sparse.manifest.losses) == {"minilm", "logits"}
    assert set(sparse.masks) == {name for name, record in sparse.manifest.layers.items() if record.pattern}


def test_the_graph_pools_and_normalises(searched: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = ["good film", "a nice movie to the movie", "it"]
    encoder = library.SentenceTransformer(str(stage(searched, "calibrate")), device="cpu")
    inputs = encoder.tokenizer(texts, padding=True, return_tensors="np")
    path = stage(searched, "export") / "model.fp32.onnx"
    found = session(path).run(
        ["sentence_embedding"], {entry.name: inputs[entry.name] for entry in session(path).get_inputs()}
    )
    assert np.asarray(found[0]) == pytest.approx(encoder.encode(texts), abs=1e-5)
    graph = onnx.load(stage(searched, "export") / "model.int8.onnx").graph
    assert [output.name for output in graph.output] == ["sentence_embedding"]


def test_evaluate_measures_a_file_as_the_export_did(searched: Path) -> None:
    recipe = load_recipe(searched / "search.yaml").recipe
    found = evaluate_artifact(stage(searched, "export") / "model.int8.onnx", Splits(recipe, searched), "dev")
    assert found == load_checkpoint(stage(searched, "export")).manifest.metrics["dev onnx-int8"]
    assert set(found) == {"recall@1", "recall@10", "mrr@10", "ndcg@10", "rerank-ndcg@10", "pnr"}


def test_a_batch_smaller_than_a_query_with_its_passages_is_refused(searched: Path) -> None:
    text = (searched / "search.yaml").read_text().replace(f"batch_size: {BATCH}", "batch_size: 3")
    (searched / "small.yaml").write_text(text)
    with raises_code("recipe-conflict", "batch_size|4 texts"):
        load_recipe(searched / "small.yaml")


def test_the_source_s_modules_are_in_every_checkpoint(searched: Path) -> None:
    for name in ("train", "prune", "calibrate", "export"):
        modules: Any = json.loads((stage(searched, name) / "modules.json").read_text())
        assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]


def test_the_shipped_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = replace_model(tmp_path, 16)
    overrides += replace_rows(tmp_path, [relevance_rows(12, seed) for seed in range(3)])
    rows = run_shipped("retrieval", tmp_path, overrides, capsys, steps=2)
    assert all(0 <= row["metrics"]["recall@10"] <= 1 for row in rows)
