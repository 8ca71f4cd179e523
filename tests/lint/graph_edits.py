"""Small graphs, small edits of graphs, and what the linter finds in them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import apply_rules, parse_target
from sqat.lint.findings import Finding
from sqat.lint.graph_view import GraphView
from sqat.lint.layer_report import lint
from tests.onnx_models import ATTENTION, Family

ENCODER = "/bert/encoder/layer.0"
SELF = f"{ENCODER}/attention/self"
LAYER = "bert.encoder.layer.0"
QUERY = f"{LAYER}.attention.self.query"
ALL = ("output", *ATTENTION, "add")
RESIDUAL = """agraph (float[batch, sequence, 64] x, float%s other) => (float[batch, sequence, 64] y)
<float s = {0.01}, int8 z = {0}, int8 z2 = {0}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = 1>(w, ws, wz)
    p = MatMul(d, wd)
    q2 = QuantizeLinear(p, s, z2)
    d2 = DequantizeLinear(q2, s, z2)
    y = Add(d2, other)
}"""


def tied(family: Family, *roles: str) -> QuantizedModel:
    """A quantization in which q, k and v of each attention have one output scale, as rule T16 requires."""
    quantization = family.quantization(*roles)
    amax = dict(quantization.amax)
    for layer in {site.rpartition(".")[0] for site in amax if site.endswith("query:output")}:
        sites = [f"{layer}.{part}:output" for part in ("query", "key", "value")]
        amax |= dict.fromkeys(sites, max(amax[site] for site in sites))
    return QuantizedModel(quantization.weights, amax)


def node(model: ModelProto, name: str) -> NodeProto:
    return next(entry for entry in model.graph.node if entry.name == name)


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(entry for entry in model.graph.initializer if entry.name == name)


def put(model: ModelProto, name: str, value: np.ndarray | np.generic) -> None:
    """Replace the value of an initializer, or add one."""
    kept = [entry for entry in model.graph.initializer if entry.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(value), name)])


def change(model: ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Edit an initializer's values in place."""
    value = numpy_helper.to_array(tensor(model, name)).copy()
    edit(value)
    put(model, name, value)


def between(model: ModelProto, name: str, operand: int, op: str, *others: str, **attributes: object) -> None:
    """Insert a node before an operand of a node."""
    target = node(model, name)
    extra = helper.make_node(op, [target.input[operand], *others], [f"{op}_out"], name=f"/{op}_extra", **attributes)
    target.input[operand] = f"{op}_out"
    model.graph.node.insert(list(model.graph.node).index(target), extra)


def bypass(model: ModelProto, name: str) -> None:
    """Remove a Q/DQ pair, named without its operators."""
    before = node(model, f"{name}/QuantizeLinear").input[0]
    after = node(model, f"{name}/DequantizeLinear").output[0]
    for entry in model.graph.node:
        entry.input[:] = [before if value == after else value for value in entry.input]
    for op in ("QuantizeLinear", "DequantizeLinear"):
        entry = node(model, f"{name}/{op}")
        if op == "QuantizeLinear":
            dropped = list(entry.input[1:])
        model.graph.node.remove(entry)
    kept = [entry for entry in model.graph.initializer if entry.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def parsed(text: str, *, opset: int = 20, imports: str = "", **constants: np.ndarray) -> ModelProto:
    """Parse a graph, with initializers of any size beside its text."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}{imports}]>\n{text}')
    for name, value in constants.items():
        put(model, name, value)
    return model


def findings_of(model: ModelProto, target: str) -> list[Finding]:
    return apply_rules(GraphView(model), None, parse_target(target))


def messages(model: ModelProto, target: str, rule: str) -> list[str]:
    return [str(finding) for finding in findings_of(model, target) if finding.rule == rule]


def verdicts(model: ModelProto, target: str = "tensorrt") -> dict[str, tuple[str, str]]:
    return {layer.name: (layer.runs, layer.reason) for layer in lint(model, parse_target(target)).layers}


def quantized_weight(rows: int = 64, columns: int = 64) -> dict[str, np.ndarray]:
    """A 2:4 weight ``w`` with scales ``ws`` and zero-points ``wz``."""
    return {"w": sparse(rows, columns), "ws": np.ones(columns, np.float32), "wz": np.zeros(columns, np.int8)}


def sparse(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Integers in [-127, 127], two non-zero ones of every four rows."""
    random = np.random.default_rng(seed)
    weight = random.integers(1, 128, (rows, columns)) * random.choice((-1, 1), (rows, columns))
    kept = np.arange(rows)[:, None] % 4 < 2
    return (weight * kept).astype(np.int8)
