"""What many tests start from: tiny encoders and decoders, a tokenizer, a task that can be learned, checkpoints."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, PreTrainedModel

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.models.layer_selection import choose_layers
from sqat.models.loading import serialize_model
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern
from tests.traces import share, traced

WORDS = ["red", "blue", *(f"w{i}" for i in range(58))]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "max_position_embeddings": 40}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
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
    "modernbert": lambda **more: transformers.ModernBertConfig(**{**BASE, **SPECIAL, "local_attention": 8, **more}),
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

# How long an example takes is the machine's affair; whatever else is set (CI's own profile) stays.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole stages first: handed to processes in this order, the short ones even out the end."""
    long = {item.path for item in items if item.get_closest_marker("pipeline")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite's processes share the cores, and sums do not depend on how many these are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages and families trace each model once in a run: the processes of pytest-xdist share a folder of graphs."""
    own = tmp_path_factory.getbasetemp()
    share((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqat.export.source.export_float", traced)
        patch.setattr("sqat.api.export.export_float", traced)
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family by name."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model(family, **settings)`: a tiny classifier in eval mode, the same weights for the same arguments."""

    def make(family: str = "bert", **settings: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIGS[family](**settings)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A word tokenizer over `VOCABULARY`, saved once and read back."""
    folder = tmp_path_factory.mktemp("tokenizer")
    BertTokenizerFast(vocab=VOCABULARY).save_pretrained(folder)
    return BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_source(make_model: MakeModel, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_source(family, **settings)`: a folder with a pretrained model and its tokenizer."""

    def make(family: str = "bert", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("source")
        make_model(family, **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def batch() -> dict[str, Tensor]:
    """Three texts of 12, 9 and 5 tokens, padded on the right."""
    ids = torch.randint(5, len(VOCABULARY), (3, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([12, 9, 5])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="session")
def make_checkpoint(make_model: MakeModel, tokenizer: Any) -> Callable[..., Checkpoint]:
    """`make_checkpoint(family, **manifest)`: pruned 2:4, every linear's input bounded, the first layer left float."""

    def make(family: str = "bert", **manifest: Any) -> Checkpoint:
        model = make_model(family)
        linears = dict(model.named_modules())
        choice = choose_layers(model, Layers(), "prune")
        masks = {name: nm_mask(linears[name].weight.detach().abs(), parse_pattern("2:4")) for name in choice.chosen}
        for name, mask in masks.items():
            linears[name].weight.data = apply_mask(linears[name].weight.detach(), mask)
        files, weights = serialize_model(model, TextProcessor(tokenizer))
        first, *rest = choice.chosen
        layers = {name: LayerRecord(pattern="2:4", quantized=True) for name in rest}
        layers[first] = LayerRecord(pattern="2:4", float_because="excluded by the recipe")
        layers |= {name: LayerRecord(dense_because=why, float_because=why) for name, why in choice.left.items()}
        sites = {f"{name}:input": SiteRecord(shared_with=f"{name}:input", saturated=0.25) for name in rest}
        amax = {site: torch.tensor(1.5 + i) for i, site in enumerate(sites)}
        entries = {"stage": "calibrate", "type": "calibrate", "fingerprint": "k" * 16, "base_model": "tiny", "seed": 3}
        known = Manifest(**{**entries, "layers": layers, "sites": sites, "placement": "linear", **manifest})
        return Checkpoint(known, files, weights, masks, amax, "# a recipe\nname: ä\n")

    return make


def labelled(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of a rule that can be learned: ``warm`` where there are more reds than blues, ``cold`` otherwise."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS[2:], k=draw.randrange(3, 9))
        colour, label = draw.choice((("red", "warm"), ("blue", "cold")))
        words.insert(draw.randrange(len(words) + 1), colour)
        rows.append({"text": " ".join(words), "label": label})
    return rows


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder with train.jsonl (64 rows), dev.jsonl (24) and test.jsonl (24)."""
    for seed, (name, count) in enumerate({"train": 64, "dev": 24, "test": 24}.items()):
        lines = "".join(json.dumps(row) + "\n" for row in labelled(count, seed))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


@pytest.fixture
def write_recipe(data_folder: Path) -> Callable[..., Path]:
    """`write_recipe(source, stages)`: a recipe for the rows of `data_folder`; JSON is YAML."""

    def write(source: Path, stages: Mapping[str, Any], **more: Any) -> Path:
        path = data_folder / "tiny.yaml"
        splits = {name: f"{name}.jsonl" for name in ("train", "dev", "test")}
        recipe = {"model": {"source": str(source), "max_length": 16}, "task": "classification", "data": splits}
        recipe |= {"output": str(data_folder / "runs"), "stages": stages, **more}
        path.write_text(json.dumps(recipe, indent=2))
        return path

    return write


class Recorder:
    """A reporter that keeps what it was told."""

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


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
