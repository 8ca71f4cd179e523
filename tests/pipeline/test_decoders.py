"""Decoders as classifiers, from a plain folder through train, prune, calibrate and qat with distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from sqat.checkpoint.store import load_checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.models.loading import build, load_pretrained
from sqat.pipeline.runner import run
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.loader import load_recipe
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern
from tests.tiny import VOCABULARY, Recorder

pytestmark = pytest.mark.pipeline

FIT = {"batch_size": 16, "learning_rate": 2e-3}
STAGES = {
    "train": {"steps": 30, **FIT},
    "prune": {"steps": 6, "distill": {"loss": "minilm-v1"}, **FIT},
    "calibrate": {"samples": 32},
    "qat": {"steps": 6, "distill": {"loss": "minilm-v2"}, **FIT},
    "export": {"targets": ["onnx-int8", "onnx-fp32", "torch-semi-structured"]},
}


def without_padding(folder: Path, **special: str) -> None:
    """Put a word tokenizer in a folder that names no padding token, and pads on the left."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for path in folder.glob("*token*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special).save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_goes_through_the_chain(
    family: str, make_source: Callable[..., Path], write_recipe: Callable[..., Path], recorder: Recorder
) -> None:
    source = make_source(family, pad_token_id=None)
    without_padding(source, eos_token="[SEP]")
    loaded = load_recipe(write_recipe(source, STAGES))
    run(loaded, recorder)
    assert "train: texts are padded with the end token [SEP]" in recorder.lines
    folder = next(loaded.run_directory.glob("??-qat"))
    checkpoint = load_checkpoint(folder)
    layers = checkpoint.manifest.layers
    assert [name for name, layer in layers.items() if not layer.pattern or not layer.quantized] == ["score"]
    assert checkpoint.manifest.losses["minilm"] > 0
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == VOCABULARY["[SEP]"]
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for name in checkpoint.masks:
        weight = plain.get_submodule(name).weight.detach()
        along_inputs = weight if family == "llama" else weight.T
        assert count_violations(along_inputs, parse_pattern("2:4")) == 0
    model, _ = build(checkpoint)
    words = torch.tensor([[7, 8, 9, 10], [11, 12, 3, 3]])
    with torch.no_grad():
        torch.testing.assert_close(plain(words).logits, model(words).logits)
    notes = load_checkpoint(next(loaded.run_directory.glob("??-export"))).manifest.notes
    assert [note.partition(":")[0] for note in notes] == ["onnx-int8", "onnx-fp32", "torch-semi-structured"]


def test_padding_does_not_move_a_score(make_source: Callable[..., Path], tmp_path: Path) -> None:
    """The score is that of the last real token, also in a batch, and where the tokenizer would pad on the left."""
    source = make_source("llama", pad_token_id=None)
    without_padding(source, eos_token="[SEP]")
    config = ModelConfig(source=str(source), max_length=16)
    model, processor = load_pretrained("texts", config, tmp_path, {"num_labels": 2}, 0)
    assert isinstance(processor, TextProcessor)
    texts = ["red w1 w2 w3 w4", "blue w5"]
    both = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model.eval()(**both).logits
        alone = [model(**processor.tokenizer(text, return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(together, torch.cat(alone))
    assert both["input_ids"][1].tolist()[2:] == [VOCABULARY["[SEP]"]] * 3


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({}, "the tokenizer has neither a padding token nor an end token to pad with"),
        ({"pad_token": "[MORE]"}, f"pads with '[MORE]', number {len(VOCABULARY)}, but the model has {len(VOCABULARY)}"),
    ],
)
def test_a_tokenizer_that_cannot_pad_is_refused(
    special: dict[str, str], message: str, make_source: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_source("llama")
    without_padding(source, **special)
    with pytest.raises(SqatError) as caught:
        load_pretrained("texts", ModelConfig(source=str(source), max_length=16), tmp_path, {"num_labels": 2}, 0)
    assert message in str(caught.value)
