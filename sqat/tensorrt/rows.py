"""One row for each layer of a file: whether it runs sparse in the engine, and if not, why.

The file's own problems go before what the build says, since only the file can be mended.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from onnx import NodeProto

from sqat.errors import SqatError
from sqat.lint.apply_rules import apply_rules
from sqat.lint.graph_view import GraphView
from sqat.lint.layer_report import SPARSE_PATTERNS, layer_rows
from sqat.lint.layer_row import LayerRow
from sqat.lint.rules.table import Target
from sqat.lint.verdicts import DOUBT, FLOAT
from sqat.lint.weight import Weight
from sqat.tensorrt.build_log import BuildLog, EngineLayer
from sqat.tensorrt.tracing import is_of_another_model, layers_by_node, trace, weight_type

DENSE_IS_FASTER = "a dense kernel was faster"


@dataclass(frozen=True)
class EngineRow:
    """One layer of the file.

    Attributes:
        node: its MatMul, Gemm or Conv as TensorRT calls it.
        shape: [out, in] of the weight.
        pattern: N:M pattern of the weight, or ``dense``.
        int8: whether its weight is quantized in the file.
        eligible: whether a sparse kernel may compute it, by TensorRT, or by our rules where TensorRT does not say.
        chosen: whether one does; None where that is unknown.
        weight_type: type of its weight in the engine, empty where that is unknown.
        kernel: the kernel that computes it, empty where that is unknown.
        reason: why it does not run sparse, empty where it does or may.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    pattern: str
    int8: bool
    eligible: bool
    chosen: bool | None
    weight_type: str
    kernel: str
    reason: str

    @property
    def sparse(self) -> bool:
        """Whether its weight is 2:4."""
        return self.pattern in SPARSE_PATTERNS


class BuildFacts(NamedTuple):
    """What a build says of one product: whether it lists it as eligible and as chosen, and what computes it."""

    eligible: bool
    chosen: bool
    layers: list[EngineLayer]


def engine_rows(view: GraphView, log: BuildLog, place: str) -> list[EngineRow]:
    """Make a row for each product that has a weight, in order of execution.

    Args:
        place: the file, for messages.

    Raises:
        SqatError: the file holds no such product, or the log is of another model.
    """
    target: Target = "tensorrt-8" if log.choice is not None and log.choice.version_8 else "tensorrt"
    reports = layer_rows(view, apply_rules(view, None, target), target, place)
    weights = {engine_name(weight.node): (weight, row) for weight, row in zip(view.all_weights, reports, strict=True)}
    names = set(weights)
    if is_of_another_model(log, names):
        raise SqatError(
            "the log names none of its layers",
            "give the log of a build from this very file",
            place,
            code="model-mismatch",
        )
    computed, by_name = layers_by_node(log.layers, names), {layer.name: layer for layer in log.layers}
    eligible, _ = trace(log.choice.eligible_names if log.choice else (), by_name, names)
    chosen, _ = trace(log.choice.chosen_names if log.choice else (), by_name, names)
    return [
        make_row(node, weight, row, BuildFacts(node in eligible, node in chosen, computed.get(node, [])), log)
        for node, (weight, row) in weights.items()
    ]


def engine_name(node: NodeProto) -> str:
    """What TensorRT calls a node, which may have no name of its own."""
    return node.name or f"node_of_{node.output[0]}"


def make_row(node: str, weight: Weight, row: LayerRow, facts: BuildFacts, log: BuildLog) -> EngineRow:
    """Make one row."""
    chosen = is_chosen(facts, log)
    eligible = is_eligible(facts, log, default=row.runs.startswith("sparse"))
    return EngineRow(
        name=row.name,
        node=node,
        shape=row.shape,
        pattern=row.pattern,
        int8=weight.dequantizer is not None,
        eligible=eligible,
        chosen=chosen,
        weight_type=weight_type(facts.layers, prod(weight.size)),
        kernel=kernel_name(facts.layers),
        reason="" if chosen else reason_not_sparse(row, facts, chosen, log),
    )


def is_eligible(facts: BuildFacts, log: BuildLog, *, default: bool) -> bool:
    """Whether TensorRT may compute a layer with a sparse kernel; ``default`` where it does not say."""
    if facts.eligible or (log.choice is not None and log.choice.lists_all_names):
        return facts.eligible
    flags = [layer.eligible for layer in facts.layers if layer.eligible is not None]
    return any(layer.sparse for layer in facts.layers) or (any(flags) if flags else default)


def is_chosen(facts: BuildFacts, log: BuildLog) -> bool | None:
    """Whether a sparse kernel computes a layer; None where the build does not say."""
    if facts.chosen or any(layer.sparse for layer in facts.layers):
        return True
    if log.chosen_later:
        return None
    if log.choice is not None and (log.choice.lists_all_names or log.choice.chosen == 0):
        return False
    return False if any(layer.tactic for layer in facts.layers) else None


def kernel_name(layers: list[EngineLayer]) -> str:
    """Name of the kernel, the sparse one first."""
    tactics = sorted((layer for layer in layers if layer.tactic), key=lambda layer: not layer.sparse)
    return tactics[0].tactic if tactics else ""


def reason_not_sparse(row: LayerRow, facts: BuildFacts, chosen: bool | None, log: BuildLog) -> str:
    """Why a layer does not run sparse; empty where it may, once the GPU chooses."""
    is_listed = is_eligible(facts, log, default=False)
    if is_listed and chosen is False and row.runs == FLOAT:
        return f"eligible; {DENSE_IS_FASTER}"  # what keeps a layer in float does not keep it dense
    if not row.runs.startswith("sparse") and not (is_listed and chosen is False):
        return row.reason
    if log.chosen_later:
        return f"in doubt: {row.reason}" if row.runs.endswith(DOUBT) else ""
    if chosen is None:
        return "the build does not say"
    if not is_eligible(facts, log, default=True):
        return "TensorRT does not list it, though the file is in order"
    return DENSE_IS_FASTER + (f", perhaps because {row.reason}" if row.reason else "")
