"""Texts with a classification head: encoders, and decoders that classify by the last real token.

A decoder's config gets its tokenizer's padding token, by which transformers finds that token. Padding stands on the
right: on the left it would shift the positions of GPT-2 and its like.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError, first_line
from sqat.models.classifiers import load_classifier, make_classifier
from sqat.models.conv1d import to_linears_
from sqat.models.head import TaskHead
from sqat.models.sources import LOADING_ERRORS
from sqat.recipe.inputs import ModelConfig


class Texts:
    """Models of transformers' AutoModelForSequenceClassification."""

    output = "logits"

    def claims(self, files: Collection[str]) -> bool:
        return True  # the last of the table

    def pretrained(self, config: ModelConfig, source: str, head: TaskHead) -> tuple[PreTrainedModel, TextProcessor]:
        """Return the pretrained encoder with a head for the task, and its tokenizer.

        Raises:
            SqatError: no such model, one that needs its own code or has no safetensors, no tokenizer, weights that are
                not this encoder's (a head of another size starts new), a head of other labels, or texts longer than the
                model reads.
        """
        try:
            model = load_classifier(AutoModelForSequenceClassification, config, source, head)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=False)
        except LOADING_ERRORS as error:
            raise SqatError(
                f"the model {config.source!r} cannot be loaded: {first_line(error)}",
                "check model.source",
                code="unsupported-model",
            ) from error
        check_vocabulary(tokenizer, source)
        check_length(model, config.max_length)
        to_linears_(model)
        if is_decoder(model):
            set_padding_(model, tokenizer, source)
        return model, TextProcessor(tokenizer)

    def model(self, folder: Path) -> PreTrainedModel:
        model = make_classifier(AutoModelForSequenceClassification, folder)
        to_linears_(model)
        return model

    def processor(self, folder: Path, place: str) -> TextProcessor:
        return TextProcessor(load_tokenizer(folder, place))


def load_tokenizer(folder: Path, place: str) -> Any:
    """Load the tokenizer in a folder, which errors call ``place``."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise SqatError(
            "no tokenizer lies beside the model", "keep its files together", place, code="model-mismatch"
        ) from error
    check_vocabulary(tokenizer, place)
    return tokenizer


def check_vocabulary(tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer without words, which transformers makes for a folder without a tokenizer."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise SqatError("no tokenizer lies beside the model", "keep its files together", place, code="model-mismatch")


def is_decoder(model: PreTrainedModel) -> bool:
    """Say whether the model is only a decoder, which reads each text from left to right."""
    return not model.config.is_encoder_decoder and any(getattr(m, "is_causal", False) for m in model.modules())


def set_padding_(model: PreTrainedModel, tokenizer: Any, source: str) -> None:
    """Give a decoder and its tokenizer one padding token, on the right; turn its cache off.

    Raises:
        SqatError: neither a padding nor an end token, or one that the model has no embedding for.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise SqatError("the tokenizer has neither a padding token nor an end token to pad with",
                            "set pad_token in its tokenizer_config.json", source, code="unsupported-model")  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token
    words = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= words:
        raise SqatError(f"the tokenizer pads with {tokenizer.pad_token!r}, number {tokenizer.pad_token_id}, but the "
                        f"model has {words} embeddings", "set pad_token to a token that it has", source,
                        code="unsupported-model")  # fmt: skip
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False


def longest_text(model: PreTrainedModel) -> int | None:
    """Return the number of tokens with a position; RoBERTa and its like start after their padding index."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)  # absent where positions are relative
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    if longest is None or table is None or table.padding_idx is None:
        return longest
    return longest - table.padding_idx - 1


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse texts longer than the model reads."""
    longest = longest_text(model)
    if longest is not None and max_length > longest:
        raise SqatError(
            f"model.max_length is {max_length}, but the model has {longest} positions",
            "lower it",
            code="recipe-conflict",
        )
