"""What a model's tables hold: tokens, token types, positions, pixels; more is refused when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from sqat.data.batch import Processor
from sqat.data.rows import Rows
from sqat.data.tokens import TextProcessor
from sqat.models.loading import load_pretrained
from sqat.models.text import longest_text
from sqat.recipe.inputs import ModelConfig
from tests.errors import raises_code
from tests.models.test_head import IMAGES, image_source
from tests.tiny import VOCABULARY, build_model

MakeSource = Callable[..., Path]
SIZE = len(VOCABULARY)


def load(source: Path, kind: str = "texts", max_length: int = 16) -> tuple[PreTrainedModel, Processor]:
    head = {"num_labels": 0 if kind == "sentences" else 2}
    model, processor = load_pretrained(kind, ModelConfig(source=str(source), max_length=max_length), Path(), head, 0)
    assert isinstance(model, PreTrainedModel)
    return model.eval(), processor


@pytest.mark.parametrize("kind", ["texts", "sentences"])
@pytest.mark.parametrize(
    ("added", "told"), [(["extra"], "'extra' with number 65,"), (["x", "y"], "'x' with number 65 and 1 more,")]
)
def test_a_token_beyond_the_table_is_told_with_its_number(
    added: list[str], told: str, kind: str, make_source: MakeSource
) -> None:
    source = make_source("bert")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(source)
    with raises_code("model-mismatch", f"the token {told} but the model's embedding table has {SIZE} rows; "
                                       "call model.resize_token_embeddings"):  # fmt: skip
        load(source, kind)
    model = build_model("bert")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(source)
    load(source, kind)


def test_a_token_beyond_the_table_of_a_vocabulary(make_source: MakeSource) -> None:
    source = make_source("roberta")
    entries = json.loads((source / "tokenizer.json").read_text())
    entries["model"]["vocab"]["far"] = 10**6
    (source / "tokenizer.json").write_text(json.dumps(entries))
    with raises_code("model-mismatch", "'far' with number 1000000"):
        load(source)


def test_token_types_beyond_the_table(make_source: MakeSource) -> None:
    source = make_source("bert", type_vocab_size=1)
    _, processor = load(source)
    assert isinstance(processor, TextProcessor)
    single = {"text": ["red"] * 3, "label": [0] * 3}
    assert len(processor.prepare(Rows.from_dict(single), 16)) == 3
    with raises_code("model-mismatch", "the type 1, but the model has 1 token types"):
        processor.prepare(Rows.from_dict({**single, "text_pair": ["blue"] * 3}), 16)
    _, wide = load(make_source("bert"))
    assert len(wide.prepare(Rows.from_dict({**single, "text_pair": ["blue"] * 3}), 16)) == 3


SMALL = {"vocab_size": SIZE, "pad_token_id": 0}
WITHOUT_LIMIT: dict[str, Callable[[], Any]] = {
    "xlnet": lambda: transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, **SMALL),
    "t5": lambda: transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
                                        decoder_start_token_id=0, **SMALL),
    "funnel": lambda: transformers.FunnelConfig(d_model=32, block_sizes=[1], n_head=2, d_head=16, d_inner=32, **SMALL),
}  # fmt: skip


@pytest.mark.parametrize("family", WITHOUT_LIMIT)
def test_relative_positions_have_no_limit(family: str) -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(WITHOUT_LIMIT[family]())
    assert longest_text(model) is None


def test_xlnet_is_loaded_with_any_length(tokenizer: Any, tmp_path: Path) -> None:
    transformers.AutoModel.from_config(WITHOUT_LIMIT["xlnet"]()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = load(tmp_path, max_length=8192)
    assert isinstance(processor, TextProcessor)
    rows = processor.prepare(Rows.from_dict({"text": ["red " * 90, "blue"], "label": [0, 1]}), 8192)
    with torch.no_grad():
        assert model(**processor.collate(rows, [0, 1]).inputs).logits.isfinite().all()


@pytest.mark.parametrize("entry", [-1, None, 0])
def test_an_entry_that_is_no_limit(entry: int | None) -> None:
    model = build_model("deberta-v2", position_biased_input=False)
    vars(model.config)["max_position_embeddings"] = entry  # as an old file has it; a new one is validated
    assert longest_text(model) is None


@pytest.mark.parametrize(
    ("family", "settings", "longest"),
    [
        ("bert", {}, 40),
        ("roberta", {"pad_token_id": 1}, 38),
        ("roberta", {"pad_token_id": 5}, 34),
        ("bart", {}, 40),
        ("gpt2", {}, 40),
        ("llama", {}, 40),
    ],
)
def test_positions_are_those_of_the_table(family: str, settings: dict[str, Any], longest: int) -> None:
    model = build_model(family, **settings)
    assert longest_text(model) == longest
    model.config.max_position_embeddings = 512  # says more than the table holds
    assert longest_text(model) == (512 if family == "llama" else longest)  # which has rotary positions


def write_preprocessor(folder: Path, **entries: Any) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"size": {"height": 32, "width": 32}}, "the model does not read images of 32 x 32"),
        ({"size": {"height": 16, "width": 24}}, "16 x 24"),
        ({"crop_size": {"height": 8, "width": 8}}, "8 x 8"),
        ({"size": {"height": 10**9, "width": 10**9}}, "a side has 1 to 8192 pixels"),
        ({"size": {"height": -4, "width": 4}}, "a side has 1 to 8192 pixels"),
        ({"image_mean": [0.5]}, "3 channels"),
        ({"image_std": [0.5, 0.0, 0.5]}, "for image_std not 0"),
        ({"image_std": ["a", "b", "c"]}, "3 channels"),
    ],
)
def test_a_preprocessor_of_another_model_is_refused(entries: dict[str, Any], told: str, tmp_path: Path) -> None:
    image_source(tmp_path, "vit")
    write_preprocessor(tmp_path, **entries)
    with raises_code("unsupported-model" if "side" in told else "model-mismatch", told):
        load(tmp_path, "images")


@pytest.mark.parametrize("family", ["resnet", "swin"])
def test_a_network_that_takes_any_size_takes_its_preprocessors(family: str, tmp_path: Path) -> None:
    image_source(tmp_path, family)
    side = 2 * IMAGES[family]["image_size"]
    write_preprocessor(tmp_path, size={"height": side, "width": side}, image_mean=0.25)
    _, processor = load(tmp_path, "images")
    assert processor.height == processor.width == side  # type: ignore[attr-defined]
    assert processor.mean == (0.25, 0.25, 0.25)  # type: ignore[attr-defined]
