"""One row for each layer of a file: whether it runs sparse in the engine, and why not where it does not.

What the file says (the linter's verdict by the rules for TensorRT) is looked at before what the build says, since only
the file can be mended: "a dense kernel was faster" is told of layers that nothing in the file speaks against.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from onnx import NodeProto

from sqat.errors import SqatError
from sqat.lint.checks import find_in
from sqat.lint.inspection import rows
from sqat.lint.report_row import LayerReport
from sqat.lint.rules import Target
from sqat.lint.verdicts import DOUBT
from sqat.lint.weights import Weight
from sqat.lint.wiring import Wiring
from sqat.tensorrt.build_log import BuildLog, EngineLayer
from sqat.tensorrt.tracing import is_of_another_model, layers_by_node, trace, weight_type

SPARSE_PATTERNS = ("1:4", "2:4")


@dataclass(frozen=True)
class EngineRow:
    """One layer of the file.

    Attributes:
        node: its MatMul, Gemm or Conv as TensorRT calls it.
        shape: [out, in] of the weight.
        pattern: N:M found in the weight, or ``dense``.
        int8: whether its weight is quantized in the file.
        eligible: whether a sparse kernel may compute it: by TensorRT, or by our rules where it does not say.
        chosen: whether one does; None where that is not known.
        weight_type: type of its weight in the engine, empty where not known.
        kernel: the kernel that computes it, empty where not known.
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


def engine_rows(wiring: Wiring, log: BuildLog, place: str) -> list[EngineRow]:
    """A row for each product that has a weight, in order of execution.

    Args:
        place: the file, for messages.

    Raises:
        SqatError: there is no such product in the file, or the log is of another model.
    """
    target: Target = "tensorrt-8" if log.choice is not None and log.choice.version_8 else "tensorrt"
    reports = rows(wiring, find_in(wiring, None, target), target, place)
    weights = {
        engine_name(weight.node): (weight, report) for weight, report in zip(wiring.layers, reports, strict=True)
    }
    known = set(weights)
    if is_of_another_model(log, known):
        raise SqatError("the log names none of its layers", "give the log of a build from this very file", place)
    computed, by_name = layers_by_node(log.layers, known), {layer.name: layer for layer in log.layers}
    eligible, _ = trace(log.choice.eligible_names if log.choice else (), by_name, known)
    chosen, _ = trace(log.choice.chosen_names if log.choice else (), by_name, known)
    return [
        row_of(node, weight, report, Told(node in eligible, node in chosen, computed.get(node, [])), log)
        for node, (weight, report) in weights.items()
    ]


class Told(NamedTuple):
    """What a build says of one product: whether it is listed as eligible and chosen, and the layers that compute it."""

    eligible: bool
    chosen: bool
    layers: list[EngineLayer]


def engine_name(node: NodeProto) -> str:
    """What TensorRT calls a node, which may have no name of its own."""
    return node.name or f"node_of_{node.output[0]}"


def row_of(node: str, weight: Weight, report: LayerReport, told: Told, log: BuildLog) -> EngineRow:
    """One row."""
    may = report.runs.startswith("sparse")
    chosen = is_chosen(told, log)
    eligible = is_eligible(told, log, otherwise=may)
    return EngineRow(
        name=report.name,
        node=node,
        shape=report.shape,
        pattern=report.pattern,
        int8=weight.dequantizer is not None,
        eligible=eligible,
        chosen=chosen,
        weight_type=weight_type(told.layers, prod(weight.size)),
        kernel=kernel_of(told.layers),
        reason="" if chosen else why_not(report, eligible, chosen, log),
    )


def is_eligible(told: Told, log: BuildLog, *, otherwise: bool) -> bool:
    """Whether TensorRT may compute a layer with a sparse kernel, as it says itself, or ``otherwise`` by our rules."""
    if told.eligible or (log.choice is not None and log.choice.names_all):
        return told.eligible
    flags = [layer.eligible for layer in told.layers if layer.eligible is not None]
    return any(layer.sparse for layer in told.layers) or (any(flags) if flags else otherwise)


def is_chosen(told: Told, log: BuildLog) -> bool | None:
    """Whether a sparse kernel computes a layer; None where the build does not say."""
    if told.chosen or any(layer.sparse for layer in told.layers):
        return True
    if log.chosen_later:
        return None
    if log.choice is not None and (log.choice.names_all or log.choice.chosen == 0):
        return False
    return False if any(layer.tactic for layer in told.layers) else None


def kernel_of(layers: list[EngineLayer]) -> str:
    """Name of the kernel, the sparse one first."""
    tactics = sorted((layer for layer in layers if layer.tactic), key=lambda layer: not layer.sparse)
    return tactics[0].tactic if tactics else ""


def why_not(report: LayerReport, eligible: bool, chosen: bool | None, log: BuildLog) -> str:
    """Why a layer does not run sparse; empty where it may, once the GPU chooses."""
    if not report.runs.startswith("sparse"):
        return report.why
    if log.chosen_later:
        return f"in doubt: {report.why}" if report.runs.endswith(DOUBT) else ""
    if chosen is None:
        return "the build does not say"
    if not eligible:
        return "TensorRT does not list it, though the file is in order"
    return "a dense kernel was faster" + (f", perhaps because {report.why}" if report.why else "")
