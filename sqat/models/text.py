"""Texts with a classification head: encoders, and decoders that classify by the last real token.

A decoder's config gets its tokenizer's padding token, by which transformers finds that token. Padding stands on the
right: on the left it would shift the positions of GPT-2 and its like.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError, first_line
from sqat.models.classifiers import load_classifier, make_classifier
from sqat.models.conv1d import to_linears_
from sqat.models.head import TaskHead
from sqat.models.sources import LOADING_ERRORS
from sqat.recipe.inputs import ModelConfig

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions_embed")


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
            tokenizer = read_tokenizer(source, config.revision)
        except LOADING_ERRORS as error:
            raise SqatError(
                f"the model {config.source!r} cannot be loaded: {first_line(error)}",
                "check the source that the recipe names",
                code="unsupported-model",
            ) from error
        check_vocabulary(tokenizer, source)
        check_length(model, config.max_length)
        to_linears_(model)
        if is_decoder(model):
            set_padding_(model, tokenizer, source)
        check_tokens(model, tokenizer, source)
        return model, TextProcessor(tokenizer, num_types=count_types(model))

    def model(self, folder: Path) -> PreTrainedModel:
        model = make_classifier(AutoModelForSequenceClassification, folder)
        to_linears_(model)
        return model

    def processor(self, folder: Path, place: str) -> TextProcessor:
        return TextProcessor(load_tokenizer(folder, place))


def read_tokenizer(source: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a source.

    Raises:
        SqatError: it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers raises Exception itself
        raise SqatError(f"the tokenizer cannot be loaded: {first_line(error)}", "get the model again", source,
                        code="unsupported-model") from error  # fmt: skip


def load_tokenizer(folder: Path, place: str) -> Any:
    """Load the tokenizer in a folder, which errors call ``place``."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise SqatError(
            "no tokenizer lies beside the model", "keep its files together", place, code="model-mismatch"
        ) from error
    check_vocabulary(tokenizer, place)
    return tokenizer


def check_vocabulary(tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer without words, which transformers makes for a folder without a tokenizer."""
    special = set(tokenizer.all_special_tokens)
    # The first test spares the second, which takes seconds where each character is a token (Canine).
    if tokenizer.vocab_size <= len(special) and set(tokenizer.get_vocab()) <= special:
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
    """Return the number of tokens with a position; None where positions are relative and have no limit."""
    entry = getattr(model.config, "max_position_embeddings", None)
    limits = [entry] if isinstance(entry, int) and entry > 0 else []  # XLNet says -1, others null
    for name, table in model.named_modules():
        weight = getattr(table, "weight", None)
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(weight, Tensor) and weight.dim() == 2:
            limits.append(len(weight) - getattr(table, "offset", 0))  # BART's table has two rows more
            padding = getattr(table, "padding_idx", None)  # RoBERTa and its like start after it
            limits.append(min(limits) - (0 if padding is None else padding + 1))
    return min(limits, default=None)


def check_tokens(model: PreTrainedModel, tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer with tokens that have no row in the model's embedding table."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # CANINE hashes characters
        return
    beyond = [(number, token) for token, number in tokenizer.get_vocab().items()
              if table is not None and number >= len(table)]  # fmt: skip
    if beyond and table is not None:
        number, token = min(beyond)
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise SqatError(f"the tokenizer has the token {token!r} with number {number}{more}, but the model's embedding "
                        f"table has {len(table)} rows", "call model.resize_token_embeddings(len(tokenizer)) and save "
                        "the model, or use its own tokenizer", place, code="model-mismatch")  # fmt: skip


def count_types(model: PreTrainedModel) -> int | None:
    """Return the number of token types that a model has; None where it has no table of them."""
    tables = (module for name, module in model.named_modules() if name.endswith("token_type_embeddings"))
    weight = getattr(next(tables, None), "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse texts longer than the model reads."""
    longest = longest_text(model)
    if longest is not None and max_length > longest:
        raise SqatError(
            f"model.max_length is {max_length}, but the model has {longest} positions",
            "lower it",
            code="recipe-conflict",
        )
