"""Export to ONNX and, at once, the proof that the file is the model: nothing is kept of a file that fails.

The float graph is traced once; each target is written from it, then checked (ONNX checker, strict shape
inference, the graph rules, N:M on the int8 values) and compared in ONNX Runtime with the fake-quantized torch
model on real dev rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from onnx import ModelProto

from sqat.checkpoint import Checkpoint
from sqat.data import Rows, collate, column
from sqat.errors import GateError, SqatError
from sqat.evaluation import onnx_logits, quantized_layers, rounded_otherwise, served_model
from sqat.export.card import model_card
from sqat.export.checks import verify
from sqat.export.graph import export_float
from sqat.export.qdq import Quantization, insert_qdq
from sqat.export.runtime import left_in_float, optimized_graph, parity, session
from sqat.job import Job, logits_of, predict
from sqat.models import use_eager
from sqat.quantization.fake_quant import quantize_weight
from sqat.recipe import ExportConfig
from sqat.tasks.slack import slack
from sqat.training import Figures

NOISE_FACTOR = 3


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file is from the torch model.

    Attributes:
        decisions: how many were compared: dev rows, or queries.
        difference: largest absolute difference of a logit.
        noise: the same between two roundings of the torch model itself.
        agreement: share of equal decisions, as the task defines them.
    """

    decisions: int
    difference: float
    noise: float
    agreement: float


def run(config: ExportConfig, parent: Checkpoint | None, job: Job) -> Checkpoint:
    """Write and prove one ONNX file per target."""
    if parent is None:
        raise SqatError(f"stage {job.name} has nothing to export", "put a train stage before it")
    model, tokenizer = job.start(parent)
    use_eager(model.cpu())
    dev = job.splits.tokens("dev", tokenizer)
    sample = collate(dev, list(range(min(2, len(dev)))), tokenizer)
    job.display.say(f"{job.name}: tracing the float graph")
    graph = export_float(model, sample.inputs)
    files = dict(parent.files)
    metrics: dict[str, Figures] = {}
    notes: list[str] = []
    for target in config.targets:
        proto = TARGETS[target](graph, parent)
        verify(proto, {name: record.pattern for name, record in parent.manifest.layers.items() if record.pattern})
        content = proto.SerializeToString()
        if float_products := left_in_float(optimized_graph(content)):
            raise GateError(f"ONNX Runtime would run {float_products[0]} of {file_name(target)} in float",
                            "this is a fault of the exporter: please report it with the recipe")  # fmt: skip
        found, metrics[f"dev {target}"] = prove(content, target, parent, dev, config, job)
        notes.append(
            f"{target}: {found.agreement:.2%} of {found.decisions} decisions equal, largest logit difference "
            f"{found.difference:.1e} (torch rounded otherwise: {found.noise:.1e})"
        )
        job.display.say(f"{job.name}: {notes[-1]}")
        files[file_name(target)] = content
    metrics["dev"] = metrics[f"dev {config.targets[0]}"]
    manifest = job.manifest(config, parent, metrics=metrics, notes=[*parent.manifest.notes, *notes])
    files["README.md"] = model_card(manifest, {n: len(c) for n, c in files.items() if n.endswith(".onnx")}).encode()
    return Checkpoint(manifest, files)


def file_name(target: str) -> str:
    """``onnx-int8`` -> ``model.int8.onnx``."""
    return f"model.{target.removeprefix('onnx-')}.onnx"


def float_target(graph: ModelProto, parent: Checkpoint) -> ModelProto:
    """The float graph as it is, weights with their zeros."""
    proto = ModelProto()
    proto.CopyFrom(graph)
    return proto


def int8_target(graph: ModelProto, parent: Checkpoint) -> ModelProto:
    """Q/DQ pairs at every site and int8 weights."""
    if not parent.amax:
        raise SqatError("target onnx-int8 needs activation scales", "put a calibrate stage before, or export onnx-fp32")
    weights = {name: quantize_weight(parent.weights[f"{name}.weight"]) for name in quantized_layers(parent)}
    amax = {site: float(parent.amax[record.leader]) for site, record in parent.manifest.sites.items()}
    return insert_qdq(graph, Quantization(weights, amax))


def prove(
    content: bytes, target: str, parent: Checkpoint, dev: Rows, config: ExportConfig, job: Job
) -> tuple[Parity, Figures]:
    """Compare the file in ONNX Runtime with the torch model it came from, and measure it on dev.

    Raises:
        GateError: a logit differs by more than rounding explains, or more decisions than the recipe allows.
    """
    runtime, task = session(content), job.task
    reference = parent if target == "onnx-int8" else replace(parent, amax={})
    with served_model(reference) as (model, tokenizer):
        some = whole_groups(dev, config.parity_samples)
        wanted = predict(partial(logits_of, model), some, tokenizer)
        with rounded_otherwise(model):
            noise = parity(wanted.numpy(), predict(partial(logits_of, model), some, tokenizer).numpy())
    got = predict(partial(onnx_logits, runtime), dev, tokenizer)
    part = got[: len(some)]
    equal = task.agreement(wanted, part, some)
    found = Parity(len(equal), parity(wanted.numpy(), part.numpy()), noise, equal.float().mean().item())
    if found.difference > NOISE_FACTOR * noise + slack(wanted) / 100:
        raise GateError(
            f"{file_name(target)} is off by {found.difference:.2e} in a logit, more than rounding explains "
            f"(torch rounded otherwise: {noise:.2e})",
            "nothing was written",
        )
    if 1 - found.agreement > config.max_disagreement:
        raise GateError(
            f"{file_name(target)} decides otherwise than the torch model in {1 - found.agreement:.2%} of "
            f"{found.decisions} decisions, allowed {config.max_disagreement:.2%} (largest logit difference "
            f"{found.difference:.2e})",
            "nothing was written",
        )
    return found, task.metrics(got, dev)


def whole_groups(rows: Rows, count: int) -> Rows:
    """The first ``count`` rows, and the rest of the last query's group."""
    count = min(count, len(rows))
    if "group" in rows.column_names:
        groups = column(rows, "group")
        while count < len(rows) and groups[count] == groups[count - 1]:
            count += 1
    return rows.select(range(count))


TARGETS: dict[str, Callable[[ModelProto, Checkpoint], ModelProto]] = {
    "onnx-int8": int8_target,
    "onnx-fp32": float_target,
}
