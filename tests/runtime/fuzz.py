"""Random nodes, many of them malformed: an answer or ONNX Runtime's error, never a crash; sound ones must answer.

    python -m tests.runtime.fuzz LIBRARY --rounds 300

Run with a library built with sanitizers (see test_runtime_builds): what they find ends the process.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from sqat import runtime
from tests.runtime.nodes import Node, available, random_linear
from tests.runtime.test_runtime_attention import node as attention_node
from tests.runtime.test_runtime_attention import random_text
from tests.runtime.test_runtime_embedding import inputs as embedding_inputs
from tests.runtime.test_runtime_embedding import node as embedding_node

SOUND = 0.4  # of the rounds
INT64 = np.iinfo(np.int64)
SCALES = (0.0, -1.0, 1e-45, 1e-40, 1e-38, 3e38, float("inf"), float("nan"), 1, "one")
WRONG: dict[str, tuple[Any, ...]] = {
    "heads": (INT64.min, INT64.min + 1, -1, 0, 7, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 // 3 + 1, INT64.max, 1.0),
    "activation": ("swish", "", "gelu" * 1000, 3),
    "y_scale": SCALES,
    "score_scale": SCALES,
    "value_scale": SCALES,
    "epsilon": SCALES,
}
ATTRIBUTES = {
    "Linear": ("activation", "y_scale", "epsilon"),
    "Attention": ("heads", "score_scale", "value_scale", "y_scale"),
}
OF_EMBEDDINGS = ("y_scale", "epsilon")


def random_node(rng: np.random.Generator) -> Node:
    kind = rng.integers(0, 3)
    if kind == 0:
        shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 40, rng.integers(1, 4)))
        channels = int(rng.integers(1, 70))
        activation = str(rng.choice(["none", "gelu", "gelu_tanh", "relu"]))
        inputs = (*shape[:-1], max(1, shape[-1]))
        seed = int(rng.integers(2**31))
        norm = rng.random() < 0.5
        linear = random_linear(seed, inputs, channels, rng.random() < 0.7, norm, activation=activation)
        if not norm and rng.random() < 0.5:
            linear = replace(linear, steps=rng.random(channels).astype(np.float32) + np.float32(0.01))
        if len(inputs) > 1 and rng.random() < 0.5:
            linear = replace(linear, mask=rng.integers(0, 2, inputs[:-1]))
        return linear.node(str(rng.choice(["Y", "Q", "YQ"])))
    if kind == 1:
        texts, tokens, heads, width = (int(n) for n in rng.integers((0, 0, 1, 1), 30))
        qkv, mask = random_text(int(rng.integers(2**31)), texts % 4, tokens, heads % 4 + 1, width, float(rng.random()))
        return attention_node(qkv, mask, heads % 4 + 1)
    width = int(rng.integers(1, 50))
    return embedding_node(*embedding_inputs(rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5, width))


def damaged(rng: np.random.Generator, array: Any) -> Any:
    """Another shape, type or content."""
    how = rng.integers(0, 7)
    if how == 0:
        return None
    if how == 6:
        return without_tokens(array)
    if how == 1:
        return array[..., : array.shape[-1] - 1].copy()
    if how == 2:
        return array[None].copy()
    if how == 3:
        return np.resize(array, (*array.shape[:-1], array.shape[-1] + 16))
    if how == 4:
        return array.reshape(-1).copy()
    return rng.integers(0, 256, array.nbytes).astype(np.uint8).view(array.dtype)[: array.size].reshape(array.shape)


def without_tokens(array: Any) -> Any:
    """None of the rows along the second axis, or along the only one."""
    return array[:, :0].copy() if array.ndim > 1 else array[:0].copy()


def damage(rng: np.random.Generator, node: Node) -> Node:
    """A node with one part of it wrong."""
    how = rng.random()
    if how < 0.3:
        name = str(rng.choice(ATTRIBUTES.get(node.op, OF_EMBEDDINGS)))
        return replace(node, attributes={**node.attributes, name: WRONG[name][rng.integers(len(WRONG[name]))]})
    if how < 0.4:
        return replace(node, fed={name: each if each is None else without_tokens(each)
                                  for name, each in node.fed.items()})  # fmt: skip
    parts = [name for group in (node.fed, node.constants) for name, value in group.items() if value is not None]
    name = str(rng.choice(parts))
    if name in node.fed:
        return replace(node, fed={**node.fed, name: damaged(rng, node.fed[name])})
    return replace(node, constants={**node.constants, name: damaged(rng, node.constants[name])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with patch.object(runtime, "LIBRARY", arguments.library):
        runtime.instruction_set()  # a library that does not load would refuse every node
        sets = available()
    counts: Counter[str] = Counter()
    for number in range(arguments.rounds):
        rng = np.random.default_rng((arguments.seed, number))
        sound = rng.random() < SOUND
        node = random_node(rng) if sound else damage(rng, random_node(rng))
        isa, sparse = str(rng.choice(sets)), str(rng.choice(["", "0", "1"]))
        try:
            node.run(isa, int(rng.integers(1, 3)), sparse, arguments.library)
            counts["answers"] += 1
        except Exception as error:  # ONNX Runtime's own classes are private
            if sound:
                raise RuntimeError(f"round {number}: a sound node is refused: {node}") from error
            counts["refusals"] += 1
    print(f"{arguments.rounds} rounds: {counts['answers']} answers, {counts['refusals']} refusals")


if __name__ == "__main__":
    main()
