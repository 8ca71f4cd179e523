"""A tiny project as a user would have it: a pretrained folder, data with a rule to learn, recipes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

GOOD, BAD = ("good", "fine", "nice"), ("bad", "awful", "nasty")
FILLER = ("alpha", "beta", "gamma", "delta", "the", "a", "of", "to", "in", "is", "it", "was", "film", "movie")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *GOOD, *BAD, *FILLER)
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "max_position_embeddings": 66}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SHAPE, **COMMON),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE, **COMMON),
    "distilbert": lambda: transformers.DistilBertConfig(n_layers=2, dim=32, n_heads=2, hidden_dim=64, **COMMON),
    "electra": lambda: transformers.ElectraConfig(embedding_size=16, **SHAPE, **COMMON),
    "mpnet": lambda: transformers.MPNetConfig(**SHAPE, **COMMON),
    "modernbert": lambda: transformers.ModernBertConfig(
        bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=8, **SHAPE, **COMMON
    ),
}
STAGES = """stages:
  train: {epochs: 4, learning_rate: 3.0e-3, batch_size: 16}
  prune: {epochs: 2, learning_rate: 5.0e-4, distill: {loss: minilm-v1}, save_every: 0}
  calibrate: {placement: PLACEMENT, samples: 64}
  qat: {epochs: 1, learning_rate: 2.0e-4, distill: {loss: minilm-v2}}
  export: {}
"""


def write_model(folder: Path, family: str, layers: int = 2) -> None:
    """Save a randomly initialised encoder of a family and a word tokenizer."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    settings = FAMILIES[family]()
    settings.num_hidden_layers = layers
    transformers.AutoModel.from_config(settings).save_pretrained(folder)


def classification_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose one telling word decides the label."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        label = choose.random() < 0.5
        words = [choose.choice(FILLER) for _ in range(choose.randint(3, 12))]
        words.insert(choose.randrange(len(words)), choose.choice(GOOD if label else BAD))
        rows.append({"text": " ".join(words), "label": "positive" if label else "negative"})
    return rows


def relevance_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Queries with nested candidates, of which the one that repeats the query's words is relevant."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        query = choose.sample(FILLER, 2)
        others = [word for word in (*FILLER, *GOOD) if word not in query]
        candidates = [{"id": f"{i}", "text": " ".join(choose.sample(others, 4)), "label": 0} for i in range(3)]
        candidates.append({"id": "3", "text": " ".join([*query, *choose.sample(others, 2)]), "label": 1})
        choose.shuffle(candidates)
        rows.append({"qid": f"q{number}", "query": " ".join(query), "candidates": candidates})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


class Project:
    """A folder with a model, data and a recipe."""

    def __init__(self, folder: Path, family: str = "bert", placement: str = "linear") -> None:
        self.folder = folder
        write_model(folder / "model", family)
        for seed, (split, count) in enumerate((("train", 300), ("dev", 80), ("test", 80))):
            write_rows(folder / f"{split}.jsonl", classification_rows(count, seed))
            write_rows(folder / f"{split}-relevance.jsonl", relevance_rows(count // 4, seed))
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(
            f"model: {{source: model, max_length: 32}}\ntask: classification\noutput: {folder / 'runs'}\n"
            "data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}\n" + STAGES.replace("PLACEMENT", placement)
        )

    def stage(self, name: str) -> Path:
        return next((self.folder / "runs" / "tiny").glob(f"??-{name}"))


class Lines:
    """A reporter that keeps its news."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def start(self, title: str, total: int) -> None:
        pass

    def advance(self, step: int, values: Any, rate: float) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Any]:
    """A tiny project whose whole recipe has run, and its results; read it, do not change it."""
    from sqat.pipeline.runner import run
    from sqat.recipe.loader import load_recipe

    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("finished"), placement="tensorrt")
    return project, run(load_recipe(project.recipe), Lines())


@pytest.fixture
def copy(finished: tuple[Project, Any], tmp_path: Path) -> Project:
    """The finished project in a folder of the test's own."""
    source, _ = finished
    shutil.copytree(source.folder, tmp_path / "project")
    project = Project.__new__(Project)
    project.folder, project.recipe = tmp_path / "project", tmp_path / "project" / "tiny.yaml"
    project.recipe.write_text(source.recipe.read_text().replace(str(source.folder), str(project.folder)))
    return project
