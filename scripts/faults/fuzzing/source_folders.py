"""Folders of foreign models: changed configs, tokenizers, modules, preprocessors, headers of weights, and links."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from scripts.faults.fuzzing.case import HOSTILE_TEXTS, Action, cut, flip_bytes
from sqat.models.loading import load_pretrained
from sqat.models.sources import source_digest
from sqat.recipe.inputs import ModelConfig

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "good", "bad")
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**24, 2**31, 2**63, 10**7, 10**12, 1.5, -0.0, float("nan"), float("inf")),
    *([], {}, [1, 2], [[]], {"a": 1}, {"0": "a", "1": "a"}, ["a"], [10**7], {"quant_method": "gptq"}),
    *HOSTILE_TEXTS,
)
KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "model_type"),
    *("max_position_embeddings", "type_vocab_size", "pad_token_id", "hidden_act", "id2label", "label2id", "image_size"),
    *("quantization_config", "architectures", "auto_map", "hidden_dropout_prob", "is_decoder", "patch_size", "dtype"),
    *("tokenizer_class", "added_tokens_decoder", "model_max_length", "pad_token", "padding_side", "do_lower_case"),
    *("size", "crop_size", "image_mean", "image_std", "image_processor_type", "problem_type", "num_labels"),
    *("pooling_mode", "pooling_mode_cls_token", "pooling_mode_mean_tokens", "word_embedding_dimension", "path", "type"),
    *("shape", "dtype", "data_offsets", "__metadata__", "model", "added_tokens", "post_processor", "use_cache"),
)
LINKS = ("/dev/zero", "/etc/hostname", "..", "config.json", "gone", "../secret")


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write the folder of a tiny model with up to three changes, and load it as one."""
    kind = draw.choice(("texts", "sentences", "images"))
    shutil.copytree(sound_folder(kind), folder, dirs_exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in draw.sample(files, min(len(files), draw.choice((0, 1, 1, 1, 2, 3)))):
        change_file(draw, path)
    return [partial(digest, folder), partial(load, kind, folder)]


def digest(folder: Path) -> None:
    """Compute what a fingerprint holds of a source."""
    source_digest(ModelConfig(source=str(folder)), folder)


def load(kind: str, folder: Path) -> None:
    """Load a folder as a recipe's source."""
    labels = {0: "bad", 1: "good"}
    head = {"num_labels": 0} if kind == "sentences" else {"num_labels": 2, "id2label": labels}
    load_pretrained(kind, ModelConfig(source=str(folder), max_length=16), folder, head, 0)


def change_file(draw: random.Random, path: Path) -> None:
    """Change a file: its bytes, its JSON, its header, or what it is."""
    how, content = draw.random(), path.read_bytes()
    if how < 0.1:
        replace_file(draw, path)
    elif how < 0.25:
        path.write_bytes(cut(draw, content) if draw.random() < 0.4 else flip_bytes(draw, content))
    elif how < 0.3:
        path.write_bytes(draw.choice((b"[" * 50_000, b"", b"null", b"[]", b"{}", b'{"a":' * 50_000, b"\xff\xfe")))
    elif path.suffix == ".safetensors":
        length = struct.unpack("<Q", content[:8])[0]
        header = change_json(draw, json.loads(content[8 : 8 + length])).encode("utf-8", "surrogatepass")
        told = len(header) if draw.random() < 0.9 else draw.choice((0, 2**62, len(content), 1))
        path.write_bytes(struct.pack("<Q", told) + header + content[8 + length :])
    else:
        path.write_text(change_json(draw, json.loads(content)), encoding="utf-8", errors="surrogatepass")


def replace_file(draw: random.Random, path: Path) -> None:
    """Put a link, a pipe, a folder or nothing in the place of a file."""
    path.unlink()
    kind = draw.choice(("link", "link", "pipe", "folder", "nothing"))
    if kind == "link":
        path.symlink_to(draw.choice(LINKS))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()


def change_json(draw: random.Random, value: Any) -> str:
    """Return JSON with up to three entries changed, added or taken away, at any depth."""
    for _ in range(draw.randint(1, 3)):
        place = value
        while isinstance(place, dict | list) and place:
            key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
                place = inner
                continue
            if draw.random() < 0.15:
                del place[key]
            elif isinstance(place, dict) and draw.random() < 0.4:
                place[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
            else:
                place[key] = copy.deepcopy(draw.choice(VALUES))
            break
    return json.dumps(value, ensure_ascii=draw.random() < 0.8)


@cache
def sound_folder(kind: str) -> Path:
    """Write the folder of a tiny model with random weights, once for the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"sound-{kind}-"))
    torch.manual_seed(0)
    labels: dict[str, Any] = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    if kind == "images":
        config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, **labels)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        entries = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(entries))
        return folder
    bert = transformers.BertConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=32, **labels)
    model = transformers.BertModel if kind == "sentences" else transformers.BertForSequenceClassification
    model(bert).save_pretrained(folder)
    BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    if kind == "sentences":
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate({"Transformer": "", "Pooling": "1_Pooling"}.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16, "pooling_mode": "cls"}')
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    return folder
