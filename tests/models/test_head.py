"""A fine-tuned source's outputs keep their meaning, whatever their order, or the head visibly starts new."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sqat.errors import SqatError
from sqat.models.head import source_labels
from sqat.models.loading import check_head, load_pretrained
from sqat.pipeline.runner import run
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.loader import load_recipe
from tests.errors import raises_code
from tests.tiny import Recorder, build_model, colour_rows, random_batch, write_rows

MakeSource = Callable[..., Path]
TEXTS = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "mpnet",
    "modernbert",
    "deberta-v2",
    "albert",
    "bart",
    "llama",
    "gpt2",
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SMALL, "image_size": 16, "patch_size": 8}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
LEVIT = {"image_size": 32, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "resnet": {**CONVOLUTIONS, "image_size": 16},
    "levit": LEVIT,
    "swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1],
             "window_size": 2},
}  # fmt: skip


def named(labels: Sequence[str]) -> dict[str, Any]:
    """Config entries of a head with labels in order."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def load(
    source: Path, labels: Sequence[str], kind: str = "texts", *, is_trained: bool = True, **config: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Load a source for labels; return the model and the lines told."""
    told: list[str] = []
    head = {"num_labels": len(labels), **named(labels), "problem_type": "single_label_classification"}
    settings = ModelConfig(source=str(source), max_length=16, **config)
    model, _ = load_pretrained(kind, settings, Path(), head, 0, is_trained=is_trained, report=told.append)
    assert isinstance(model, PreTrainedModel)
    return model.eval(), told


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def image_source(folder: Path, family: str, **head: Any) -> PreTrainedModel:
    """Write an image classifier with random weights and its preprocessor."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, architectures=[], **IMAGES[family], **head)
    model: PreTrainedModel = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(folder)
    side = IMAGES[family]["image_size"]
    entries = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    return model


@pytest.mark.parametrize("family", TEXTS)
def test_each_output_goes_to_the_label_of_its_name(family: str, make_source: MakeSource) -> None:
    theirs = ("pos", "neutral", "neg", "mixed")
    ours = tuple(sorted(theirs))
    source = make_source(family, **named(theirs))
    model, told = load(source, ours)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    inputs = random_batch()
    inputs["input_ids"][range(3), inputs["attention_mask"].sum(1) - 1] = 3  # the end token, which BART reads
    wanted = logits(plain, inputs)[:, [theirs.index(label) for label in ours]]
    assert torch.equal(logits(model, inputs), wanted)
    assert told == ["the outputs mixed, neg, neutral, pos of the source's head become mixed, neg, neutral, pos"]
    assert model.config.id2label == dict(enumerate(ours))


@pytest.mark.parametrize("family", IMAGES)
def test_each_output_of_an_image_head_goes_to_its_label(family: str, tmp_path: Path) -> None:
    theirs, ours = ("dog", "cat", "bird"), ("bird", "cat", "dog")
    plain = image_source(tmp_path, family, **named(theirs))
    model, _ = load(tmp_path, ours, "images")
    pixels = {"pixel_values": torch.randn(2, 3, IMAGES[family]["image_size"], IMAGES[family]["image_size"])}
    assert torch.equal(logits(model, pixels), logits(plain, pixels)[:, [2, 1, 0]])


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), [0, 1, 2]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("2", "0", "1"), [2, 0, 1]),
        (("0", "1", "2"), ("LABEL_1", "LABEL_0", "LABEL_2"), [1, 0, 2]),
        (("2", "1", "0"), ("0", "1", "2"), [2, 1, 0]),
        (("POS", "NEG", "Neutral"), ("neg", "neutral", "pos"), [1, 2, 0]),
        (("not entailment", "entailment", "other"), ("entailment", "not_entailment", "Other "), [1, 0, 2]),
        (("pos", "POS", "Pos"), ("POS", "Pos", "pos"), [1, 2, 0]),
        (("äther", "straße", "x"), ("STRASSE", "X", "Äther"), [1, 2, 0]),
        (("a", "b", "c"), ("a", "b", "c"), [0, 1, 2]),
    ],
)
def test_names_may_differ_in_case_and_punctuation(
    theirs: tuple[str, ...], ours: tuple[str, ...], order: list[int], make_source: MakeSource
) -> None:
    source = make_source("bert", **named(theirs))
    model, told = load(source, ours, is_trained=False)
    plain = build_model("bert", **named(theirs))
    assert torch.equal(logits(model, random_batch()), logits(plain, random_batch())[:, order])
    assert len(told) == (theirs != ours)


@pytest.mark.parametrize(
    ("theirs", "ours", "lacking"),
    [
        (("pos", "neg"), ("bad", "good"), ("pos", "neg", "bad", "good")),
        (("pos", "neg", "neutral"), ("neg", "neutrl", "pos"), ("neutral", "neutrl")),
        (("contradiction", "neutral", "entailment"), ("0", "1", "2"), ("contradiction", "0")),
        (("a", "A"), ("a", "b"), ("b",)),
        (("1", "2"), ("neg", "pos"), ("1", "pos")),
        (("same", "same"), ("other", "same"), ("other",)),
    ],
)
@pytest.mark.parametrize("is_trained", [True, False])
def test_labels_of_other_names_are_refused_by_name(
    is_trained: bool, theirs: tuple[str, ...], ours: tuple[str, ...], lacking: tuple[str, ...], make_source: MakeSource
) -> None:
    source = make_source("bert", id2label=dict(enumerate(theirs)))
    with pytest.raises(SqatError) as error:
        load(source, ours, is_trained=is_trained)
    assert error.value.code == "model-mismatch"
    assert all(name in error.value.problem for name in lacking)
    for choice in ("in-order", "new"):
        load(source, ours, is_trained=is_trained, head=choice)


def test_outputs_without_names_say_nothing_of_labels(make_source: MakeSource) -> None:
    source, ours = make_source("bert"), ("cold", "warm")
    plain = build_model("bert")
    trained, told = load(source, ours)
    assert told == ["the head starts new: its outputs in the source are LABEL_0, LABEL_1, the labels cold, warm"]
    assert not torch.equal(trained.classifier.weight, plain.classifier.weight)
    assert torch.equal(trained.bert.pooler.dense.weight, plain.bert.pooler.dense.weight)
    with raises_code("model-mismatch", "LABEL_0, LABEL_1.*cold, warm"):
        load(source, ours, is_trained=False)
    kept, told = load(source, ours, is_trained=False, head="in-order")
    assert torch.equal(kept.classifier.weight, plain.classifier.weight)
    assert told == []


def test_a_head_of_another_size_starts_new_and_says_so(make_source: MakeSource) -> None:
    source = make_source("bert", **named(("a", "b", "c")))
    model, told = load(source, ("a", "b"))
    assert told == ["the head starts new: the source's has 3 outputs (a, b, c), the task 2"]
    assert model.classifier.weight.shape == (2, 32)
    with raises_code("recipe-conflict"):
        load(source, ("a", "b"), head="in-order")


def test_a_new_head_is_random_by_the_seed_and_of_an_encoder_without_a_word(make_source: MakeSource) -> None:
    source = make_source("bert", **named(("b", "a")))
    first, told = load(source, ("a", "b"), head="new")
    again, _ = load(source, ("a", "b"), head="new")
    assert told == ["the head starts new, as model.head says"]
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, build_model("bert").bert.pooler.dense.weight)
    encoder = make_source("bert")
    transformers.BertModel.from_pretrained(encoder).save_pretrained(encoder)
    model, told = load(encoder, ("cold", "warm"), is_trained=False)
    assert told == []
    torch.manual_seed(0)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)


def test_half_a_head_starts_new_as_a_whole(make_source: MakeSource) -> None:
    source = make_source("bert", **named(("b", "a")))
    tensors = load_file(source / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model, told = load(source, ("a", "b"))
    assert told == ["the head starts new: the source has no weights for it"]
    assert not set(model.classifier.weight.flatten().tolist()) & set(tensors["classifier.weight"].flatten().tolist())


def test_one_output_has_no_order(make_source: MakeSource) -> None:
    source = make_source("bert", num_labels=1)
    head = {"num_labels": 1, **named(("score",)), "problem_type": "regression"}
    model, _ = load_pretrained("texts", ModelConfig(source=str(source), max_length=16), Path(), head, 0)
    assert torch.equal(model.classifier.weight, build_model("bert", num_labels=1).classifier.weight)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": 0, "1": 1}}, ("0", "1")),
        ({"label2id": {"b": 0, "a": 1}}, ("b", "a")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"b": 0, "a": 1}}, ("b", "a")),
        ({"id2label": {"0": "b", "1": "a"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ("b", "a")),
        ({"id2label": {str(i): f"n{i}" for i in range(12)}}, tuple(f"n{i}" for i in range(12))),
    ],
)
def test_the_labels_of_a_config(config: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert source_labels(config, "c") == labels


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": {"a": 0, "b": 1}},
        {"id2label": ["a", "b"]},
        {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}},
        {"label2id": {"a": "b"}},
    ],
)
def test_labels_that_are_numbered_unsoundly_are_refused(config: dict[str, Any]) -> None:
    with raises_code("unsupported-model", "id2label"):
        source_labels(config, "c")


def test_a_foreign_file_with_labels_in_another_order_is_not_measured() -> None:
    fields = named(("neg", "pos"))
    check_head(json.dumps(named(("neg", "pos"))).encode(), 2, fields, "m.onnx")
    check_head(json.dumps({}).encode(), 2, named(("0", "1")), "m.onnx")
    check_head(json.dumps(named(("LABEL_0",))).encode(), 1, named(("score",)), "m.onnx")
    for other in (named(("pos", "neg")), {}, named(("neg", "pos", "x"))):
        with raises_code("model-mismatch"):
            check_head(json.dumps(other).encode(), 2, fields, "m.onnx")


@pytest.mark.parametrize(
    "config",
    ["[" * 100_000, "[]", "3", "{", '{"num_labels": "x"}', '{"num_labels": 1e9}', '{"num_labels": 1000000000}',
     '{"num_labels": [2]}', '{"num_labels": -1}', '{"id2label": 3}',
     '{"id2label": {"0": "a", "1": "b"}, "label2id": 3}'],
)  # fmt: skip
def test_a_config_of_a_file_that_is_none_is_one_line(config: str) -> None:
    """Found by scripts/faults/fuzz: a checkpoint may hold any config.json that its manifest knows."""
    with pytest.raises(SqatError, match=r"m\.onnx") as error:
        check_head(config.encode(), 2, {}, "m.onnx")
    assert "\n" not in str(error.value)


@pytest.mark.pipeline
def test_a_fine_tuned_source_keeps_its_accuracy_without_a_step(
    make_source: MakeSource, tokenizer: Any, write_recipe: Callable[..., Path], recorder: Recorder
) -> None:
    """Rows with the source's own predictions as labels: its accuracy is 1."""
    theirs = ("warm", "cold")
    source = make_source("bert", **named(theirs))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    rows = colour_rows(64, 0)
    tokens = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    scores = logits(plain, dict(tokens))
    middle = scores[:, 0].sub(scores[:, 1]).median() / 2
    with torch.no_grad():
        plain.classifier.bias.add_(torch.stack([-middle, middle]))
    plain.save_pretrained(source)
    for row, output in zip(rows, logits(plain, dict(tokens)).argmax(1).tolist(), strict=True):
        row["label"] = theirs[output]
    path = write_recipe(source, {"train": {"steps": 0}})
    for split in ("train", "dev", "test"):
        write_rows(path.parent / f"{split}.jsonl", rows)
    (row,) = run(load_recipe(path), recorder).rows
    assert row.metrics["accuracy"] == 1.0
    assert any("become cold, warm" in line for line in recorder.lines)
