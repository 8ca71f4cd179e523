"""What an ONNX file says about its layers, whoever wrote it: a row per product that has a weight, and the findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from sqat.errors import SqatError
from sqat.export.names import module_of, needs_kernels
from sqat.lint.apply_rules import apply_rules, list_findings
from sqat.lint.findings import Finding
from sqat.lint.graph_view import DEQUANTIZE, GraphView, label
from sqat.lint.layer_row import LayerRow
from sqat.lint.rules.table import Target
from sqat.lint.verdicts import DOUBT, GOALS, Verdict, judge_layers
from sqat.lint.weight import FLOATS, HALF, Weight, count_nonzeros
from sqat.onnx_files.read import read_onnx
from sqat.sparsity.pattern import Pattern

SPARSE_PATTERNS = ("1:4", "2:4")
GROUP_SIZES = (4, 8, 16, 32)
INT8_MAX = 127


@dataclass(frozen=True)
class LintReport:
    """What the linter says of one file.

    Attributes:
        target: whose rules it was checked by.
        layers: a row per layer, in order of execution.
        findings: broken rules.
    """

    target: Target
    layers: list[LayerRow]
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the file wrong or keep it from being accelerated."""
        return [finding for finding in self.findings if not finding.warning]

    @property
    def running(self) -> int:
        """Number of layers that will run as the target should run them."""
        return sum(layer.runs in GOALS[self.target].runs for layer in self.layers)

    @property
    def doubtful(self) -> int:
        """Number of layers that may."""
        goals = {f"{runs}{DOUBT}" for runs in GOALS[self.target].runs}
        return sum(layer.runs in goals for layer in self.layers)

    @property
    def reasons(self) -> list[tuple[int, str, str]]:
        """How many layers run in another way, how, and why; most frequent first."""
        others = Counter((layer.runs, layer.reason) for layer in self.layers if layer.reason)
        return [(count, runs, reason) for (runs, reason), count in others.most_common()]


def inspect_onnx(path: Path) -> list[LayerRow]:
    """Report every MatMul, Gemm and Conv with a weight of an ONNX file, by the rules for TensorRT.

    Raises:
        SqatError: no such file, not ONNX, cut short, external data missing, or no layer in it.
    """
    view = GraphView(read_onnx(path))
    return layer_rows(view, apply_rules(view, None, "tensorrt"), "tensorrt", str(path))


def lint(model: ModelProto, target: Target, place: str = "") -> LintReport:
    """Check a model by the rules of a target.

    Args:
        place: the file, for messages.

    Raises:
        SqatError: no layer in it.
    """
    findings = list_findings(model, None, target)
    view = GraphView(model)
    layers = layer_rows(view, findings, target, place)
    return LintReport(target, layers, [*findings, *missing_layers(view, layers, target)])


def layer_rows(view: GraphView, findings: Sequence[Finding], target: Target, place: str) -> list[LayerRow]:
    """Make a row per layer."""
    refuse_kernels(view.model, place)
    if not view.all_weights:
        raise SqatError(
            "holds no MatMul, Gemm or Conv with a constant weight, so no layer to inspect",
            place=place,
            code="no-layer",
        )
    verdicts = judge_layers(view, findings, target)
    return [make_row(view, weight, verdict) for weight, verdict in zip(view.all_weights, verdicts, strict=True)]


def refuse_kernels(model: ModelProto, place: str) -> None:
    """Raise SqatError for a file of target cpu-sparse."""
    if needs_kernels(model):
        raise SqatError(
            "is of target cpu-sparse: its layers are operators of sqat, which these rules do not read",
            "name the checkpoint that it was exported from",
            place,
            code="unsupported-target",
        )


def missing_layers(view: GraphView, layers: Sequence[LayerRow], target: Target) -> list[Finding]:
    """A finding if a file holds none of the layers that its target is for."""
    quantized = any(
        weight.dequantizer is not None or weight.stored.data_type not in FLOATS for weight in view.all_weights
    )
    half = any(weight.stored.data_type in HALF for weight in view.weights)
    if target == "onnx-fp16" and not half:
        problem = "holds no float16 weight, so no layer runs in float16"
        return [Finding("layers", "", problem, requirement="float16 layers", advice="export the target onnx-fp16")]
    if not target.startswith("onnx-fp") and not quantized:
        problem = "holds no quantized layer, so none will run in int8"
        advice = "quantize it (stages calibrate, qat), then export again"
        return [Finding("layers", "", problem, requirement="quantized layers", advice=advice)]
    if target not in ("onnx-int8", "onnx-fp32") and not any(layer.runs.startswith("sparse") for layer in layers):
        sparse = sum(layer.pattern in SPARSE_PATTERNS for layer in layers)
        advice = f"see the reasons above: {sparse} of them have 2:4 weights" if sparse else "prune to 2:4 (stage prune)"
        return [Finding("layers", "", "no layer will run sparse", True, "sparse layers", advice)]
    return []


def make_row(view: GraphView, weight: Weight, verdict: Verdict) -> LayerRow:
    """Make one row."""
    scale = view.constant_value(weight.dequantizer.input[1]) if weight.dequantizer is not None else None
    return LayerRow(
        name=module_of(weight.node) or weight.node.name or weight.name or label(weight.node),
        shape=(weight.size[1], weight.size[0], *kernel_shape(weight)),
        pattern=weight.once("pattern", lambda: find_pattern(weight.values, weight.reduction)),
        zeros=weight.zeros,
        weight_scale=None if scale is None or not scale.size else (float(scale.min()), float(scale.max())),
        input_amax=input_amax(view, weight),
        sqnr_db=None,
        saturated=None,
        runs=verdict.runs,
        reason=verdict.reason,
    )


def kernel_shape(weight: Weight) -> tuple[int, ...]:
    """Window of a convolution; empty for other products and for 1x1."""
    window = weight.dims[-1][2:] if weight.out == 0 and "Conv" in weight.node.op_type else ()
    return window if any(size != 1 for size in window) else ()


def find_pattern(values: NDArray[np.generic], reduction: int) -> str:
    """The N:M pattern of every aligned group along an axis, ``dense`` where there is none."""
    sizes = [m for m in GROUP_SIZES if values.shape[reduction] % m == 0]
    most = [(max(1, int(count_nonzeros(values, m, reduction).max(initial=0))), m) for m in sizes]
    # A pattern that prunes half or more goes first, since rounding to int8 adds zeros by chance; then the smallest
    # group, since a 2:4 weight also is 4:8.
    patterns = sorted(((n, m) for n, m in most if n < m), key=lambda pattern: pattern[0] * 2 > pattern[1])
    return str(Pattern(*patterns[0])) if patterns else "dense"


def input_amax(view: GraphView, weight: Weight) -> float | None:
    """Largest absolute input that int8 represents, from the scale of the DQ before the layer."""
    dequantizer = view.producer(weight.node.input[0], DEQUANTIZE)
    scale = view.constant_value(dequantizer.input[1]) if dequantizer is not None else None
    return float(scale.max()) * INT8_MAX if scale is not None and scale.size else None
