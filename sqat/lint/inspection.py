"""What an ONNX file says about its layers, whoever wrote it: a row per product that has a weight, and the findings.

The weight is read through Q, DQ and changes of layout; its pattern is the N:M that the stored values themselves have.
Left out: quantization error and saturation, which need the float weight and the data that the file left behind.
"""

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
from sqat.export.onnx_files import read_onnx
from sqat.lint.checks import find, find_in
from sqat.lint.findings import Finding
from sqat.lint.report_row import LayerReport
from sqat.lint.rules import Target
from sqat.lint.verdicts import DOUBT, WANTED, Verdict, verdicts, why_float
from sqat.lint.weights import FLOATS, HALF, Weight, kept_in_groups
from sqat.lint.wiring import DEQUANTIZE, Wiring, label
from sqat.sparsity.pattern import Pattern

GROUPS = (4, 8, 16, 32)
HIGH = 127


@dataclass(frozen=True)
class Lint:
    """What the linter says of one file.

    Attributes:
        target: whose rules it was held against.
        layers: a row per layer, in order of execution.
        findings: broken rules.
    """

    target: Target
    layers: list[LayerReport]
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the file wrong or keep it from being accelerated."""
        return [finding for finding in self.findings if not finding.warning]

    @property
    def running(self) -> int:
        """Layers that will run as the target wants."""
        return sum(layer.runs in WANTED[self.target] for layer in self.layers)

    @property
    def doubtful(self) -> int:
        """Layers that may."""
        return sum(layer.runs.removesuffix(DOUBT) in WANTED[self.target] for layer in self.layers) - self.running

    @property
    def reasons(self) -> list[tuple[int, str, str]]:
        """How many layers run otherwise than wanted, how, and why; most frequent first."""
        others = Counter((layer.runs, layer.why) for layer in self.layers if layer.why)
        return [(count, runs, why) for (runs, why), count in others.most_common()]


def inspect_onnx(path: Path) -> list[LayerReport]:
    """Report every MatMul, Gemm and Conv with a weight of an ONNX file, in order of execution.

    How a layer would run is judged by the rules for TensorRT.

    Raises:
        SqatError: no such file, not ONNX, cut short, external data missing, or no layer in it.
    """
    wiring = Wiring(read_onnx(path))
    return rows(wiring, find_in(wiring, None, "tensorrt"), "tensorrt", str(path))


def lint(model: ModelProto, target: Target, place: str = "") -> Lint:
    """Hold a model against the rules of a target.

    Args:
        place: the file, for messages.

    Raises:
        SqatError: no layer in it.
    """
    findings = find(model, None, target)
    wiring = Wiring(model)
    layers = rows(wiring, findings, target, place)
    return Lint(target, layers, [*findings, *about_layers(wiring, layers, target)])


def rows(wiring: Wiring, findings: Sequence[Finding], target: Target, place: str) -> list[LayerReport]:
    """A row per layer."""
    if needs_kernels(wiring.model):
        raise SqatError(
            "is of target cpu-sparse: its layers are operators of sqat's own, of which these rules know nothing",
            "name the checkpoint that it was exported from",
            place,
        )
    if not wiring.layers:
        raise SqatError("holds no MatMul, Gemm or Conv with a constant weight, so no layer to inspect", place=place)
    judged = zip(wiring.layers, verdicts(wiring, findings, target), strict=True)
    return [report(wiring, weight, verdict) for weight, verdict in judged]


def about_layers(wiring: Wiring, layers: Sequence[LayerReport], target: Target) -> list[Finding]:
    """What is wrong with a file that holds none of the layers that its target is for."""
    quantized = any(weight.dequantizer is not None or weight.stored.data_type not in FLOATS for weight in wiring.layers)
    half = any(weight.stored.data_type in HALF for weight in wiring.weights)
    if target == "onnx-fp16" and not half:
        problem = "holds no float16 weight, so no layer runs in float16"
        return [Finding("layers", "", problem, asks="float16 layers", fix="export the target onnx-fp16")]
    if not target.startswith("onnx-fp") and not quantized:
        problem = "holds no quantized layer, so none will run in int8"
        advice = "quantize it (stages calibrate, qat), then export again"
        return [Finding("layers", "", problem, asks="quantized layers", fix=advice)]
    if target not in ("onnx-int8", "onnx-fp32") and not any(layer.runs.startswith("sparse") for layer in layers):
        advice = "prune to 2:4 (stage prune), and see the reasons above"
        return [Finding("layers", "", "no layer will run sparse", True, "sparse layers", advice)]
    return []


def report(wiring: Wiring, weight: Weight, verdict: Verdict) -> LayerReport:
    """One row."""
    values = weight.values
    pattern = find_pattern(values, weight.reduction)
    scale = wiring.constant(weight.dequantizer.input[1]) if weight.dequantizer is not None else None
    amax = input_amax(wiring, weight)
    return LayerReport(
        name=module_of(weight.node) or weight.node.name or weight.name or label(weight.node),
        shape=(weight.size[1], weight.size[0], *kernel(weight)),
        pattern=pattern,
        zeros=float(np.equal(values, 0).mean()),
        weight_scale=None if scale is None else (float(scale.min()), float(scale.max())),
        input_amax=amax,
        sqnr_db=None,
        saturated=None,
        reason="; ".join(
            [*(f"float: {text}" for text in why_float(weight, amax is not None)), *why_dense(weight, pattern)]
        ),
        runs=verdict.runs,
        why=verdict.why,
    )


def kernel(weight: Weight) -> tuple[int, ...]:
    """Sizes of a convolution's window, nothing for other products and windows of one."""
    window = weight.dims[-1][2:] if weight.out == 0 and "Conv" in weight.node.op_type else ()
    return window if any(size != 1 for size in window) else ()


def find_pattern(values: NDArray[np.generic], reduction: int) -> str:
    """The N:M that every aligned group along an axis keeps, ``dense`` where there is none.

    Half or more of a group pruned counts before less, and a small group before a large one: a 2:4 weight also
    is 4:8, and rounding to int8 adds zeros by chance.
    """
    sizes = [m for m in GROUPS if values.shape[reduction] % m == 0]
    most = [(max(1, int(kept_in_groups(values, m, reduction).max(initial=0))), m) for m in sizes]
    found = sorted(((n, m) for n, m in most if n < m), key=lambda pattern: pattern[0] * 2 > pattern[1])
    return str(Pattern(*found[0])) if found else "dense"


def input_amax(wiring: Wiring, weight: Weight) -> float | None:
    """Bound of the layer's input, from the scale of the DQ before it."""
    dequantizer = wiring.producer(weight.node.input[0], DEQUANTIZE)
    scale = wiring.constant(dequantizer.input[1]) if dequantizer is not None else None
    return float(scale.max()) * HIGH if scale is not None else None


def why_dense(weight: Weight, pattern: str) -> list[str]:
    """Why a layer has no pattern, as far as the file tells."""
    if pattern != "dense":
        return []
    if weight.size[0] % 4:
        return [f"dense: {weight.size[0]} inputs are not a multiple of 4"]
    return ["dense: no N:M pattern in its weight"]
