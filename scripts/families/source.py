"""What a family's user has: a folder with config, random weights and tokenizer or image processor, and rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CanineTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scripts.families.registry import FAMILIES, LONGEST, SPECIAL, VOCABULARY, WORDS, Family
from sqat.data.pixels import ImageProcessor

GOOD, BAD = ("good", "great", "fine", "nice", "happy"), ("bad", "awful", "poor", "ugly", "sad")
SPLITS = {"train": 24, "dev": 8, "test": 8}  # rows
BODIES = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}


def write_source(folder: Path, name: str, seed: int = 0) -> None:
    """Write the folder that ``model.source`` of a recipe names."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    body: Any = build_family(family, seed).base_model  # a fine-tuner starts without a head
    body.save_pretrained(folder)
    if family.kind == "text":
        make_tokenizer(family).save_pretrained(folder)
    else:
        ImageProcessor(family.side, family.side, (0.5,) * 3, (0.5,) * 3).save(folder)


def build_family(family: Family, seed: int = 0) -> PreTrainedModel:
    """Return a tiny classifier of the family in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**family.entries)
    model: PreTrainedModel = BODIES[family.kind].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.eval()
    return model


def make_tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words, or of characters, with the inputs that the family's own gives."""
    names = ["input_ids", *["token_type_ids"] * family.types, "attention_mask"]
    if family.by_characters:
        return CanineTokenizer(model_max_length=LONGEST)
    tokens = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = ("[CLS]", 2), ("[SEP]", 3)
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[start, end]
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="[SEP]", model_max_length=LONGEST, model_input_names=names, **roles
    )


def write_splits(folder: Path, family: Family) -> dict[str, str]:
    """Write train, dev and test rows that can be learned; return the name of each file."""
    names = {}
    for seed, (split, count) in enumerate(SPLITS.items()):
        if family.kind == "text":
            names[split] = write_texts(folder, split, count, seed)
        else:
            names[split] = write_images(folder, split, count, seed, family.side)
    return names


def write_texts(folder: Path, split: str, count: int, seed: int) -> str:
    """Write sentences of four to nine words, some of which tell the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        telling = GOOD if number % 2 else BAD
        words = [draw.choice(telling if draw.random() < 0.4 else WORDS[10:]) for _ in range(draw.randint(4, 9))]
        rows.append({"text": " ".join([*words, draw.choice(telling)]), "label": "good" if number % 2 else "bad"})
    (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return f"{split}.jsonl"


def write_images(folder: Path, split: str, count: int, seed: int, side: int) -> str:
    """Write noise with a bright half, left or right."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = draw.integers(0, 120, (count, side, side, 3)).astype(np.uint8)
    pixels[labels == 0, :, : side // 2] = 250
    pixels[labels == 1, :, side // 2 :] = 250
    np.savez(folder / f"{split}.npz", x=pixels, y=labels)
    return f"{split}.npz"
