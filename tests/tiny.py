"""Builders of tiny things, shared by the tests: models, tokenizers, data files, projects, and a recording reporter."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizerFast, PreTrainedModel

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.models.layer_selection import choose_layers
from sqat.models.loading import serialize_model
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern

GOOD, BAD = ("good", "fine", "nice"), ("bad", "awful", "nasty")
FILLER = ("alpha", "beta", "gamma", "delta", "the", "a", "of", "to", "in", "is", "it", "was", "film", "movie")
WORDS = ["red", "blue", *(f"w{i}" for i in range(58))]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "max_position_embeddings": 40}
ROTARY = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
BASE = {**SHAPE, **COMMON, "initializer_range": 0.2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **more: transformers.BertConfig(**{**BASE, **more}),
    "roberta": lambda **more: transformers.RobertaConfig(**{**BASE, **more}),
    "distilbert": lambda **more: transformers.DistilBertConfig(
        **{"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64, **COMMON, "initializer_range": 0.2, **more}
    ),
    "electra": lambda **more: transformers.ElectraConfig(**{**BASE, "embedding_size": 16, **more}),
    "mpnet": lambda **more: transformers.MPNetConfig(**{**BASE, **more}),
    "modernbert": lambda **more: transformers.ModernBertConfig(**{**BASE, **ROTARY, "local_attention": 8, **more}),
    "deberta-v2": lambda **more: transformers.DebertaV2Config(
        **{**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        | {"position_buckets": 8, **more}
    ),
    "deberta": lambda **more: transformers.DebertaConfig(
        **{**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], **more}
    ),
    "albert": lambda **more: transformers.AlbertConfig(**{**BASE, "embedding_size": 16, **more}),
    "bart": lambda **more: transformers.BartConfig(
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **COMMON}
        | {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": 3, **more}
    ),
    "llama": lambda **more: transformers.LlamaConfig(**{**BASE, **GROUPED, **more}),
    "qwen2": lambda **more: transformers.Qwen2Config(**{**BASE, **GROUPED, **more}),
    "mistral": lambda **more: transformers.MistralConfig(**{**BASE, **GROUPED, **more}),
    "gpt2": lambda **more: transformers.GPT2Config(
        **{"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64, "n_positions": 40, "vocab_size": len(VOCABULARY)}
        | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2, **more}
    ),
}
FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert")

MakeModel = Callable[..., PreTrainedModel]

STAGES = """stages:
  train: {epochs: 4, learning_rate: 3.0e-3, batch_size: 16}
  prune: {epochs: 2, learning_rate: 5.0e-4, distill: {loss: minilm-v1}, save_every: 0}
  calibrate: {placement: PLACEMENT, samples: 64}
  qat: {epochs: 1, learning_rate: 2.0e-4, distill: {loss: minilm-v2}}
  export: {}
"""


def build_model(family: str = "bert", **settings: Any) -> PreTrainedModel:
    """Return a tiny classifier in eval mode: the same weights for the same arguments."""
    torch.manual_seed(0)
    config = CONFIGS[family](**settings)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def write_model(
    folder: Path, family: str = "bert", words: Sequence[str] = (*GOOD, *BAD, *FILLER), **settings: Any
) -> None:
    """Write an encoder with random weights and a word tokenizer: what ``model.source`` of a recipe names."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"vocab_size": len(vocabulary), "max_position_embeddings": 66, "initializer_range": 0.02}
    AutoModel.from_config(CONFIGS[family](**{**small, **settings})).save_pretrained(folder)


def random_batch(seed: int = 1) -> dict[str, Tensor]:
    """Return three texts of 12, 9 and 5 tokens, padded on the right."""
    ids = torch.randint(5, len(VOCABULARY), (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < torch.tensor([12, 9, 5])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def build_checkpoint(model: PreTrainedModel, tokenizer: Any, **manifest: Any) -> Checkpoint:
    """Return a checkpoint: 2:4 in every linear, an amax for every linear's input, the first layer not quantized."""
    linears = dict(model.named_modules())
    choice = choose_layers(model, Layers(), "prune")
    masks = {name: nm_mask(linears[name].weight.detach().abs(), parse_pattern("2:4")) for name in choice.chosen}
    for name, mask in masks.items():
        linears[name].weight.data = apply_mask(linears[name].weight.detach(), mask)
    files, weights = serialize_model(model, TextProcessor(tokenizer))
    first, *rest = choice.chosen
    layers = {name: LayerRecord(pattern="2:4", quantized=True) for name in rest}
    layers[first] = LayerRecord(pattern="2:4", float_because="excluded")
    layers |= {name: LayerRecord(dense_because=why, float_because=why) for name, why in choice.skipped.items()}
    sites = {f"{name}:input": SiteRecord(shared_with=f"{name}:input", saturated=0.25) for name in rest}
    amax = {site: torch.tensor(1.5 + i) for i, site in enumerate(sites)}
    entries = {"stage": "calibrate", "type": "calibrate", "fingerprint": "k" * 16, "base_model": "tiny", "seed": 3}
    entries |= {"layers": layers, "sites": sites, "placement": "linear", **manifest}
    return Checkpoint(Manifest(**entries), files, weights, masks, amax, "# a recipe\nname: ä\n")


def colour_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return texts with a rule that can be learned: ``warm`` where a red stands, ``cold`` where a blue does."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS[2:], k=draw.randrange(3, 9))
        colour, label = draw.choice((("red", "warm"), ("blue", "cold")))
        words.insert(draw.randrange(len(words) + 1), colour)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def classification_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return sentences of which one word decides the label."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        label = choose.random() < 0.5
        words = [choose.choice(FILLER) for _ in range(choose.randint(3, 12))]
        words.insert(choose.randrange(len(words)), choose.choice(GOOD if label else BAD))
        rows.append({"text": " ".join(words), "label": "positive" if label else "negative"})
    return rows


def relevance_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return queries with nested candidates; the one that repeats the query's words is relevant."""
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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


class Project:
    """A folder with a model, data and a recipe: what a user has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.yaml"

    def stage(self, name: str) -> Path:
        """Return the folder of a stage that ran."""
        return next((self.folder / "runs" / "tiny").glob(f"??-{name}"))

    def copy(self, folder: Path) -> Project:
        """Copy the project, with its runs, to a new folder."""
        shutil.copytree(self.folder, folder)
        project = Project(folder)
        project.recipe.write_text(self.recipe.read_text().replace(str(self.folder), str(folder)))
        return project


def write_project(folder: Path, family: str = "bert", placement: str = "linear") -> Project:
    """Write a tiny project: sentences to classify, queries to rank, a recipe of five stages."""
    write_model(folder / "model", family)
    for seed, (split, count) in enumerate((("train", 300), ("dev", 80), ("test", 80))):
        write_rows(folder / f"{split}.jsonl", classification_rows(count, seed))
        write_rows(folder / f"{split}-relevance.jsonl", relevance_rows(count // 4, seed))
    project = Project(folder)
    project.recipe.write_text(
        f"model: {{source: model, max_length: 32}}\ntask: classification\noutput: {folder / 'runs'}\n"
        "data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}\n" + STAGES.replace("PLACEMENT", placement)
    )
    return project


class Recorder:
    """A reporter that keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[tuple[str, int]] = []
        self.updates: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def info(self, text: str) -> None:
        self.lines.append(text)

    def start(self, title: str, total: int) -> None:
        self.bars.append((title, total))

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        self.updates.append((step, dict(values)))

    def finish(self) -> None:
        self.ended += 1
