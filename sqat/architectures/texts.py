"""Text encoders with a classification head (one logit or several), and their tokenizers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sqat.data import TextProcessor
from sqat.errors import SqatError
from sqat.recipe import ModelConfig
from sqat.sources import LOADING, first_line


class Texts:
    """Models of transformers' AutoModelForSequenceClassification."""

    output = "logits"

    def claims(self, files: Collection[str]) -> bool:
        return True  # the last of the table

    def pretrained(
        self, config: ModelConfig, source: str, head: Mapping[str, Any]
    ) -> tuple[PreTrainedModel, TextProcessor]:
        """The pretrained encoder with a fresh head, and its tokenizer.

        Raises:
            SqatError: no such model, one that needs its own code or has no safetensors, no tokenizer, weights that are
                not this encoder's (a head of another size is replaced), or texts longer than the model reads.
        """
        known = {"revision": config.revision, "trust_remote_code": False}
        try:
            settings = AutoConfig.from_pretrained(source, **known, **head)
            set_dropout(settings, config.dropout)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **known,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **known)
        except LOADING as error:
            raise SqatError(
                f"the model {config.source!r} cannot be loaded: {first_line(error)}", "check model.source"
            ) from error
        check_encoder(model, report, source)
        check_vocabulary(tokenizer, source)
        check_length(model, config.max_length)
        return model, TextProcessor(tokenizer)

    def model(self, folder: Path) -> PreTrainedModel:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
        return model

    def processor(self, folder: Path, place: str) -> TextProcessor:
        return TextProcessor(load_tokenizer(folder, place))


def load_tokenizer(folder: Path, place: str) -> Any:
    """The tokenizer that lies in a folder, which errors call ``place``."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except LOADING as error:
        raise SqatError("no tokenizer lies beside the model", "keep its files together", place) from error
    check_vocabulary(tokenizer, place)
    return tokenizer


def check_encoder(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Refuse an encoder that kept some of its random weights; only the pooler and the head may be new."""
    new = [*sorted(report["missing_keys"]), *(name for name, *_ in report["mismatched_keys"])]
    inside = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if inside:
        raise SqatError(f"the weights of {source!r} are not those its config.json describes: {len(inside)} are missing "
                        f"or of another shape, the first is {inside[0]}", "check model.source")  # fmt: skip


def check_vocabulary(tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer without words, which is what transformers makes of a folder that holds none."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise SqatError("no tokenizer lies beside the model", "keep its files together", place)


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens the model has positions for; RoBERTa and its like start after their padding index."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)  # absent where positions are relative
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    if longest is None or table is None or table.padding_idx is None:
        return longest
    return longest - table.padding_idx - 1


def check_length(model: PreTrainedModel, wanted: int) -> None:
    """Refuse texts longer than the model reads."""
    longest = longest_text(model)
    if longest is not None and wanted > longest:
        raise SqatError(f"model.max_length is {wanted}, but the model has {longest} positions", "lower it")


def set_dropout(settings: Any, rate: float | None) -> None:
    """Replace every dropout rate of a transformers config; families name them differently, but all say dropout."""
    if rate is None:
        return
    for name, value in settings.to_dict().items():
        if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(settings, name, rate)
