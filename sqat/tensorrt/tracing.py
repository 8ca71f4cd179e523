"""Find the ONNX nodes behind an engine's layers.

TensorRT names a fused layer after its parts (``a + b``; ``a+b_myl0_3`` from Myelin) and, with details, lists the ONNX
nodes in it. TensorRT 8 has names only; names of Myelin's generated kernels (``__myl_FcAddTanh``) say nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set

from sqat.tensorrt.build_log import BuildLog, EngineLayer

MYELIN_SUFFIX = re.compile(r"_myl\d+_\d+$")
WHOLE_PART = "{ForeignNode["  # names a whole part of the graph, not its layers
NUMBER = re.compile(r"_\d+$")
PRODUCT_KIND = re.compile(r"gemm|conv|matmul|matrix|fc|fully|fusion|mha", re.I)


def named_nodes(name: str, nodes: Set[str]) -> set[str]:
    """Nodes of the file in the name of an engine layer.

    Args:
        nodes: names to look for; TensorRT may put a number behind one.
    """
    parts = [name, *re.split(r" \+ |\+", MYELIN_SUFFIX.sub("", name))]
    return {node for part in parts for node in (part, NUMBER.sub("", part)) if node in nodes}


def computed_nodes(layer: EngineLayer, nodes: Set[str]) -> set[str]:
    """Products of the file that an engine layer computes."""
    if WHOLE_PART in layer.name:
        return set()
    # The name goes first: a pointwise kernel behind a product lists the product's node too.
    names = named_nodes(layer.name, nodes)
    if not names and (layer.sparse or PRODUCT_KIND.search(f"{layer.kind} {layer.name}")):
        names = set(layer.nodes) & nodes
    return names


def layers_by_node(layers: Iterable[EngineLayer], nodes: Set[str]) -> dict[str, list[EngineLayer]]:
    """Engine layers that compute each product of the file."""
    result: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in layers:
        for node in computed_nodes(layer, nodes):
            result[node].append(layer)
    return result


def trace(names: Iterable[str], layers: Mapping[str, EngineLayer], nodes: Set[str]) -> tuple[set[str], list[str]]:
    """Find the nodes behind the names in a ``(Sparsity)`` line.

    Args:
        layers: engine layers by name, empty where the log does not describe them.

    Returns:
        The nodes, and the names without one.
    """
    traced: set[str] = set()
    untraced: list[str] = []
    for name in names:
        own = computed_nodes(layers[name], nodes) if name in layers else named_nodes(name, nodes)
        traced |= own
        untraced += [] if own else [name]
    return traced, untraced


def weight_type(layers: Iterable[EngineLayer], size: int) -> str:
    """Type in which an engine holds the weight of a product, empty where it does not say.

    Args:
        layers: that compute the product.
        size: elements of the weight; merged layers hold several weights.
    """
    large = [tensor for layer in layers for tensor in layer.constants if tensor.count >= size]
    return max(large, key=lambda tensor: tensor.count).type if large else ""


def is_of_another_model(log: BuildLog, nodes: Set[str]) -> bool:
    """Whether nothing that a log names is in the file."""
    names = [*(log.choice.eligible_names if log.choice else ()), *(layer.name for layer in log.layers)]
    parts = {node for layer in log.layers for node in layer.nodes}
    return (
        bool(names)
        and not parts & nodes
        and not any("ForeignNode" in name or named_nodes(name, nodes) for name in names)
    )
