"""Inputs of a model, drawn at random: valid token ids, masks of full length, pictures and whatever else it names.

What a float graph computes does not change how long it takes, but every artifact must see the same values for their
outputs to be compared: each input is drawn from a generator of its own, seeded by its name. Left out: padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sqat.errors import SqatError

Feeds = dict[str, NDArray[Any]]
UNKNOWN_VOCABULARY = 100
USUAL_TOKENS = 128


class Input(NamedTuple):
    """An input of a model; None in its shape is a free size: the first the batch, the others tokens."""

    name: str
    shape: tuple[int | None, ...]
    kind: str

    @property
    def has_tokens(self) -> bool:
        return None in self.shape[1:]


class Limits(NamedTuple):
    """One more than the largest token id, and the longest text; None where nothing says."""

    vocabulary: int = UNKNOWN_VOCABULARY
    tokens: int | None = None


def draw_inputs(inputs: Iterable[Input], limits: Limits, batch: int, tokens: int | None) -> Feeds:
    """Values of every input by name.

    Raises:
        SqatError: a model has a fixed batch or length other than this one.
    """
    return {each.name: draw(each, limits, batch, tokens) for each in inputs}


def draw(each: Input, limits: Limits, batch: int, tokens: int | None) -> NDArray[Any]:
    """One input."""
    if each.shape and each.shape[0] not in (None, batch):
        raise SqatError(f"input {each.name} has a fixed batch of {each.shape[0]}, not {batch}", "set --batch")
    shape = [(tokens or 1) if size is None else size for size in each.shape]
    shape[:1] = [batch] * bool(shape)
    random = np.random.default_rng(zlib.crc32(each.name.encode()))
    kind = np.dtype(each.kind)
    if "mask" in each.name:
        return np.ones(shape, kind)
    if np.issubdtype(kind, np.floating):
        return random.standard_normal(shape).astype(kind)
    if "type" in each.name:
        return np.zeros(shape, kind)
    return random.integers(0, limits.vocabulary, shape).astype(kind)


def inputs_of_config(config: Mapping[str, Any], place: str) -> list[Input]:
    """Inputs of a torch model by its config: of a text or of pictures.

    Raises:
        SqatError: it is neither.
    """
    if "vocab_size" in config:
        return [Input(name, (None, None), "int64") for name in ("input_ids", "attention_mask")]
    size, channels = config.get("image_size"), config.get("num_channels")
    if size is not None and channels is not None:
        height, width = size if isinstance(size, list) else (size, size)
        return [Input("pixel_values", (None, channels, height, width), "float32")]
    raise SqatError("its config does not tell the inputs", "name an ONNX file of the same model too", place)


def limits_of(configs: Sequence[Mapping[str, Any]]) -> Limits:
    """The smallest vocabulary and the shortest longest text of several models."""
    sizes = [int(config["vocab_size"]) for config in configs if config.get("vocab_size")]
    lengths = [int(config["max_position_embeddings"]) for config in configs if config.get("max_position_embeddings")]
    offset = 2 if any(config.get("model_type") in OFFSET for config in configs) else 0
    return Limits(min(sizes, default=UNKNOWN_VOCABULARY), min(lengths) - offset if lengths else None)


def usual_tokens(limits: Limits) -> int:
    """The length to measure where none was asked for."""
    return min(USUAL_TOKENS, limits.tokens or USUAL_TOKENS)


OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions begin at 2
