"""Sentence encoders: checkpoints of sentence-transformers in and out, tokens pooled to one vector.

Its modules Transformer, Pooling (mean, cls or max) and Normalize are read and written; a source without
``modules.json`` gets mean pooling and normalization. Pooling is a forward hook, so weights keep AutoModel's names and
``SentenceTransformer(checkpoint)`` loads what sqat writes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError, first_line
from sqat.models.classifiers import set_dropout
from sqat.models.head import TaskHead
from sqat.models.pooling import (
    MODULES,
    NORMALIZE,
    OLD_MODES,
    POOLING,
    POOLS,
    SETTINGS,
    Pooling,
    read_object,
    read_pooling,
    reader_of,
    side_files,
)
from sqat.models.source_files import CONFIG, header_of, shapes_on_meta
from sqat.models.sources import LOADING_ERRORS, check_loaded
from sqat.models.text import check_length, check_tokens, check_vocabulary, count_types, load_tokenizer, read_tokenizer
from sqat.recipe.inputs import ModelConfig


@dataclass(frozen=True)
class SentenceProcessor(TextProcessor):
    """A tokenizer, and what else lies in a sentence-transformers folder.

    Attributes:
        width: of an embedding, H.
        max_length: tokens that a text is cut to by whoever loads the folder.
        carried: other files of the source by name, as they were.
    """

    pooling: Pooling
    width: int
    max_length: int
    carried: Mapping[str, bytes]

    def save(self, folder: Path) -> None:
        """Write a folder that `SentenceTransformer` loads, in the form that its old versions read too."""
        self.tokenizer.save_pretrained(folder)
        settings = read_object(self.carried.get, SETTINGS, "")
        modes = {key: mode == self.pooling.mode for key, mode in OLD_MODES.items() if mode in POOLS}
        settings_files = {
            MODULES: module_list(self.pooling.normalized),
            SETTINGS: {**settings, "max_seq_length": self.max_length, "do_lower_case": False},
            POOLING: {"word_embedding_dimension": self.width, **modes},
        }
        if self.pooling.normalized:
            settings_files[NORMALIZE] = {}
        contents = {name: f"{json.dumps(value, indent=2)}\n".encode() for name, value in settings_files.items()}
        for name, content in {**self.carried, **contents}.items():
            path = folder / name
            if name in contents or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def module_list(normalized: bool) -> list[dict[str, Any]]:
    """Content of modules.json."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if normalized else {})}
    return [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(paths.items())
    ]


class Sentences:
    """Models of transformers' AutoModel with pooling."""

    output = "sentence_embedding"

    def claims(self, files: Collection[str]) -> bool:
        return MODULES in files

    def pretrained(self, config: ModelConfig, source: str, head: TaskHead) -> tuple[PreTrainedModel, SentenceProcessor]:
        """The encoder of the source, pooled its way or the recipe's (``head.entries["pooling"]``).

        Raises:
            SqatError: no such model, modules or a pooling that sqat does not know, weights that are not this
                encoder's, no tokenizer, or texts longer than the model reads.
        """
        options = {"revision": config.revision, "trust_remote_code": False}
        try:
            header = header_of(source)
            settings = AutoConfig.from_pretrained(source, **options)
            set_dropout(settings, config.dropout)
            shapes_on_meta(AutoModel.from_config, settings, header, str(Path(source) / CONFIG))
            model, report = AutoModel.from_pretrained(
                source, config=settings, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = read_tokenizer(source, config.revision)
            read = reader_of(source, config.revision)
            pooling, carried = read_pooling(read, source), side_files(source, read)
        except LOADING_ERRORS as error:
            raise SqatError(
                f"the model {config.source!r} cannot be loaded: {first_line(error)}",
                "check the source that the recipe names",
                code="unsupported-model",
            ) from error
        new = [name for name in sorted(report["missing_keys"]) if not name.startswith("pooler.")]  # nothing reads it
        check_loaded(new, source)
        check_vocabulary(tokenizer, source)
        check_tokens(model, tokenizer, source)
        check_length(model, config.max_length)
        pooling = Pooling(head.entries.get("pooling", pooling.mode), pooling.normalized)
        return add_pooling_(model, pooling), SentenceProcessor(
            tokenizer, pooling, model.config.hidden_size, config.max_length, carried, num_types=count_types(model)
        )

    def model(self, folder: Path) -> PreTrainedModel:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: PreTrainedModel = AutoModel.from_config(settings, dtype=torch.float32)
        return add_pooling_(model, read_pooling(reader_of(str(folder)), str(folder)))

    def processor(self, folder: Path, place: str) -> SentenceProcessor:
        read = reader_of(str(folder))
        width = AutoConfig.from_pretrained(folder, trust_remote_code=False).hidden_size
        longest = read_object(read, SETTINGS, place).get("max_seq_length")
        tokenizer = load_tokenizer(folder, place)
        return SentenceProcessor(tokenizer, read_pooling(read, place), width, longest or tokenizer.model_max_length,
                                 side_files(str(folder), read))  # fmt: skip


def add_pooling_(model: PreTrainedModel, pooling: Pooling) -> PreTrainedModel:
    """Hook the pooling to a model; a pooler of its own is frozen, since nothing reads it."""
    model.register_forward_hook(pooling, with_kwargs=True)
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)
    return model
