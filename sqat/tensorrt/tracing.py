"""From an engine's layers back to the nodes of the ONNX file.

What: TensorRT names a fused layer after its parts (``a + b``; ``a+b_myl0_3`` in what Myelin compiles), and with
details it lists the ONNX nodes that a layer was made from. A name is trusted first, since a pointwise kernel behind a
product lists the product's node too. Why both: TensorRT 8 has names only, and the names of Myelin's generated kernels
(``__myl_FcAddTanh``) say nothing.

Left out: ``{ForeignNode[first...last]}``, which names a whole part of the graph, so that which of its layers is meant
cannot be told from the name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set

from sqat.tensorrt.build_log import BuildLog, EngineLayer

MYELIN_SUFFIX = re.compile(r"_myl\d+_\d+$")
WHOLE_PART = "{ForeignNode["
NUMBER = re.compile(r"_\d+$")
PRODUCT_KIND = re.compile(r"gemm|conv|matmul|matrix|fc|fully|fusion|mha", re.I)


def named_nodes(name: str, known: Set[str]) -> set[str]:
    """Nodes of the file in the name of an engine layer.

    Args:
        known: names of the nodes looked for; TensorRT may have put a number behind one.
    """
    parts = [name, *re.split(r" \+ |\+", MYELIN_SUFFIX.sub("", name))]
    return {node for part in parts for node in (part, NUMBER.sub("", part)) if node in known}


def nodes_of(layer: EngineLayer, known: Set[str]) -> set[str]:
    """Products of the file that an engine layer computes: those in its name, else those it was made from."""
    found = named_nodes(layer.name, known)
    if WHOLE_PART in layer.name:
        return set()
    if not found and (layer.sparse or PRODUCT_KIND.search(f"{layer.kind} {layer.name}")):
        found = set(layer.nodes) & known
    return found


def layers_by_node(layers: Iterable[EngineLayer], known: Set[str]) -> dict[str, list[EngineLayer]]:
    """Engine layers that compute each product of the file."""
    found: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in layers:
        for node in nodes_of(layer, known):
            found[node].append(layer)
    return found


def trace(names: Iterable[str], layers: Mapping[str, EngineLayer], known: Set[str]) -> tuple[set[str], list[str]]:
    """Nodes behind the names in a ``(Sparsity)`` line, and the names that cannot be traced to any.

    Args:
        layers: engine layers by name, empty where the log does not describe them.
    """
    nodes: set[str] = set()
    untraced: list[str] = []
    for name in names:
        found = nodes_of(layers[name], known) if name in layers else named_nodes(name, known)
        nodes |= found
        untraced += [] if found else [name]
    return nodes, untraced


def weight_type(layers: Iterable[EngineLayer], size: int) -> str:
    """Type in which an engine holds the weight of a product, empty where it does not say.

    Args:
        layers: that compute the product.
        size: elements of the weight; merged layers hold several.
    """
    large = [tensor for layer in layers for tensor in layer.constants if tensor.count >= size]
    return max(large, key=lambda tensor: tensor.count).type if large else ""


def is_of_another_model(log: BuildLog, known: Set[str]) -> bool:
    """Whether what a log names is not in the file at all."""
    names = [*(log.choice.eligible_names if log.choice else ()), *(layer.name for layer in log.layers)]
    parts = {node for layer in log.layers for node in layer.nodes}
    return (
        bool(names)
        and not parts & known
        and not any("ForeignNode" in name or named_nodes(name, known) for name in names)
    )
