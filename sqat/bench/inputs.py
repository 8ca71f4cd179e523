"""Random inputs of a model: valid token ids, masks without padding, images, and other floats.

Each input has its own generator, seeded by its name: every artifact gets the same values, so outputs can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sqat.errors import SqatError

Feeds = dict[str, NDArray[Any]]
DEFAULT_VOCABULARY = 100
DEFAULT_TOKENS = 128
POSITION_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # model types whose positions begin at 2


class Input(NamedTuple):
    """An input of a model.

    Attributes:
        shape: None for a free size: the batch in the first place, tokens elsewhere.
        dtype: NumPy's name.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def has_tokens(self) -> bool:
        return None in self.shape[1:]


class Limits(NamedTuple):
    """The vocabulary size, and the maximum number of tokens; None if unknown."""

    vocabulary: int = DEFAULT_VOCABULARY
    tokens: int | None = None


def draw_inputs(inputs: Iterable[Input], limits: Limits, batch: int, tokens: int | None) -> Feeds:
    """Draw the values of every input, by name."""
    return {each.name: draw_input(each, limits, batch, tokens) for each in inputs}


def draw_input(each: Input, limits: Limits, batch: int, tokens: int | None) -> NDArray[Any]:
    """Make the values of one input: masks 1, token types 0, all others random with a seed of the name."""
    if each.shape and each.shape[0] not in (None, batch):
        problem = f"input {each.name} has a fixed batch of {each.shape[0]}, not {batch}"
        raise SqatError(problem, "set --batch", code="usage")
    shape = [(tokens or 1) if size is None else size for size in each.shape]
    shape[:1] = [batch] * bool(shape)
    random = np.random.default_rng(zlib.crc32(each.name.encode()))
    dtype = np.dtype(each.dtype)
    if "mask" in each.name:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(shape).astype(dtype)
    if "type" in each.name:
        return np.zeros(shape, dtype)
    return random.integers(0, limits.vocabulary, shape).astype(dtype)


def inputs_of_config(config: Mapping[str, Any], place: str) -> list[Input]:
    """Return the inputs of a torch model by its config: text or image."""
    if "vocab_size" in config:
        return [Input(name, (None, None), "int64") for name in ("input_ids", "attention_mask")]
    size, channels = config.get("image_size"), config.get("num_channels")
    if size is not None and channels is not None:
        height, width = size if isinstance(size, list) else (size, size)
        return [Input("pixel_values", (None, channels, height, width), "float32")]
    raise SqatError("its config does not say its inputs", "add an ONNX file of the same model", place,
                    code="unsupported-model")  # fmt: skip


def limits_of(configs: Sequence[Mapping[str, Any]]) -> Limits:
    """Return the smallest vocabulary and the smallest maximum of tokens of several models."""
    sizes = [int(config["vocab_size"]) for config in configs if config.get("vocab_size")]
    lengths = [int(config["max_position_embeddings"]) for config in configs if config.get("max_position_embeddings")]
    offset = 2 if any(config.get("model_type") in POSITION_OFFSET for config in configs) else 0
    return Limits(min(sizes, default=DEFAULT_VOCABULARY), min(lengths) - offset if lengths else None)


def default_tokens(limits: Limits) -> int:
    """Return the number of tokens to measure if none is given."""
    return min(DEFAULT_TOKENS, limits.tokens or DEFAULT_TOKENS)
