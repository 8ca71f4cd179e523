"""Tiny ONNX classifiers of token ids, and one of pictures, each with the config beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, CLASSES = 50, 3
CONFIG = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "architectures": ["BertForSequenceClassification"]}


def write_classifier(path: Path, seed: int = 0, noise: float = 0.0, batch: int | str = "batch") -> Path:
    """Mean of the tokens' scores as logits; ``noise`` is added to the table of another file of the same seed."""
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, CLASSES)).astype(np.float32)
    table += noise * np.random.default_rng(seed + 1).standard_normal(table.shape).astype(np.float32)
    ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT64, [batch, "sequence"])
                 for name in ("input_ids", "attention_mask"))  # fmt: skip
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["share"]),
        helper.make_node("Mul", ["rows", "share"], ["masked"]),
        helper.make_node("ReduceMean", ["masked", "tokens"], ["logits"], keepdims=0),
    ]
    stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2]), "last"),
              numpy_helper.from_array(np.array([1]), "tokens")]  # fmt: skip
    return save(helper.make_graph(nodes, "g", [ids, mask], [logits], stored), path, CONFIG)


def write_pictures(path: Path) -> Path:
    """The mean of each channel."""
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 4, 4])
    means = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    node = helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    return save(helper.make_graph([node], "g", [pixels], [means], [axes]), path, {"image_size": 4, "num_channels": 3})


def save(graph: onnx.GraphProto, path: Path, config: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    path.with_name("config.json").write_text(json.dumps(config))
    return path
