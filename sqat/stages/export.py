"""Export to the files of the engines and, at once, the proof that each is the model: nothing is kept of one that fails.

The float graph is traced once; each target is written from it or from the checkpoint, checked by its rules, run on
the CPU, and compared with the torch model on real dev rows. Left out: engines, which `sqat engine` builds from the
file of the target ``tensorrt``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from onnx import ModelProto
from torch import Tensor

from sqat.artifacts import open_artifact
from sqat.checkpoint import Checkpoint
from sqat.data import Rows, collate, column
from sqat.engine.recipe import build_files
from sqat.errors import GateError, SqatError
from sqat.evaluation import LAST_BITS, quantized_layers, rounded_otherwise, served_model
from sqat.export.card import model_card
from sqat.export.compressed import check_contents, write_compressed
from sqat.export.conv1x1 import to_conv1x1
from sqat.export.embeddings import Widened, store_embeddings, stored_tables
from sqat.export.files import write_onnx
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.graph import export_float
from sqat.export.opset17 import to_opset17
from sqat.export.packed import write_packed
from sqat.export.qdq import Quantization, insert_qdq
from sqat.export.runtime import left_in_float, optimized_graph, parity
from sqat.job import Job, logits_of, predict
from sqat.lint.checks import known_target, verify
from sqat.models import PreTrainedModel, use_eager
from sqat.quantization.fake_quant import quantize_weight
from sqat.recipe import ExportConfig
from sqat.tasks.slack import slack
from sqat.training import Figures

NOISE_FACTOR = 3
HALF_BITS = 2.0**-11


@dataclass(frozen=True)
class Source:
    """What a target is written from.

    Attributes:
        checkpoint: the parent, with weights, masks and bounds.
        model: built from it, in eval mode on the CPU, eager attention.
        inputs: an example batch by input name.
        sequence: smallest, usual and largest number of tokens.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    config: ExportConfig
    sequence: tuple[int, int, int]

    @cached_property
    def graph(self) -> ModelProto:
        """The float graph, traced once for all targets."""
        return export_float(self.model, self.inputs)


@dataclass(frozen=True)
class Written:
    """What a target wrote, and what it must agree with.

    Attributes:
        reference: the checkpoint whose torch model computes the same.
        rounding: relative error of one operation in the written form.
        notes: what the target could not express.
    """

    reference: Checkpoint
    rounding: float = LAST_BITS
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parity:
    """How far a file is from the torch model.

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
    """Write and prove the files of every target."""
    if parent is None:
        raise SqatError(f"stage {job.name} has nothing to export", "put a train stage before it")
    model, tokenizer = job.start(parent)
    use_eager(model.cpu())
    dev = job.splits.tokens("dev", tokenizer)
    sample = collate(dev, list(range(min(2, len(dev)))), tokenizer)
    source = Source(parent, model.eval(), sample.inputs, config, sequence_range(config, job.recipe.model.max_length))
    metrics: dict[str, Figures] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sqat-") as name:
        folder = Path(name)
        for target in config.targets:
            job.display.say(f"{job.name}: writing {target}")
            written = TARGETS[target](source, folder)
            found, metrics[f"dev {target}"] = prove(folder / file_name(target), written, dev, config, job)
            notes.append(
                f"{target}: {found.agreement:.2%} of {found.decisions} decisions equal, largest logit difference "
                f"{found.difference:.1e} (torch rounded otherwise: {found.noise:.1e})"
            )
            job.display.say(f"{job.name}: {notes[-1]}")
            notes += [f"{target}: {note}" for note in written.notes]
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    metrics["dev"] = metrics[f"dev {config.targets[0]}"]
    manifest = job.manifest(config, parent, metrics=metrics, notes=[*parent.manifest.notes, *notes])
    sizes = {target: artifact_bytes(files, file_name(target)) for target in config.targets}
    card = model_card(manifest, {target: (file_name(target), size) for target, size in sizes.items()})
    return Checkpoint(manifest, {**parent.files, **files, "README.md": card.encode()})


def sequence_range(config: ExportConfig, longest: int) -> tuple[int, int, int]:
    """Smallest, usual and largest number of tokens an engine is built for."""
    return config.sequence or (min(16, longest), max(min(16, longest), longest // 2), longest)


def file_name(target: str) -> str:
    """``onnx-int8`` -> ``model.int8.onnx``; the two targets that are no graph have a folder of their own."""
    folders = {"torch-semi-structured": "semi-structured", "compressed-tensors": "compressed-tensors"}
    return folders.get(target, f"model.{target.removeprefix('onnx-')}.onnx")


def artifact_bytes(files: dict[str, bytes], name: str) -> int:
    """Bytes of a file with its external data, or of a folder."""
    return sum(
        len(content) for path, content in files.items() if path == name or path.startswith((f"{name}.data", f"{name}/"))
    )


def write_fp32(source: Source, folder: Path) -> Written:
    """The float graph as it is, weights with their zeros."""
    return write_graph(source, "onnx-fp32", with_embeddings(source, source.graph), folder, float_reference(source))


def write_fp16(source: Source, folder: Path) -> Written:
    """The float graph in float16, weights with their zeros; scores are scaled before the product, where they fit."""
    graph = to_float16(fold_attention_scale(with_embeddings(source, source.graph, "table")))
    return write_graph(source, "onnx-fp16", graph, folder, float_reference(source), HALF_BITS)


def write_int8(source: Source, folder: Path) -> Written:
    """Q/DQ pairs at every site and int8 weights."""
    graph = with_embeddings(source, insert_qdq(source.graph, quantization_of(source.checkpoint, "onnx-int8")))
    return write_graph(source, "onnx-int8", graph, folder, source.checkpoint)


def write_tensorrt(source: Source, folder: Path) -> Written:
    """Int8 in and out of every linear, in the flavour asked for, and what builds an engine of it."""
    options, config = source.config.tensorrt, source.config
    if source.checkpoint.manifest.profile == "linear":
        raise SqatError(
            "target tensorrt needs the scales of the linears' outputs, and the checkpoint was calibrated with "
            "profile linear",
            "set stages.calibrate.profile: tensorrt",
        )
    quantization = quantization_of(source.checkpoint, "tensorrt")
    graph = fold_attention_scale(insert_qdq(source.graph, quantization, options.weights))
    graph = with_embeddings(source, to_conv1x1(graph) if options.layers == "conv1x1" else graph, "table")
    version_8 = options.layers == "conv1x1" and options.weights == "qdq"
    half = options.precision == "fp16" and not version_8  # which is told by a flag to use float16
    if version_8:
        graph = to_opset17(graph)
    if half:
        graph = to_float16(graph)
    rules, rounding = ("tensorrt-8" if version_8 else "tensorrt"), (HALF_BITS if half else LAST_BITS)
    written = write_graph(source, "tensorrt", graph, folder, source.checkpoint, rounding, rules)
    shapes = dict.fromkeys(source.inputs, ("batch", "sequence"))
    made = build_files(file_name("tensorrt"), inputs=shapes, batch=config.batch, sequence=source.sequence,
                       precision=options.precision, layers=options.layers, weights=options.weights)  # fmt: skip
    write_files(made, folder)
    return written


def write_graph(
    source: Source,
    target: str,
    graph: ModelProto,
    folder: Path,
    reference: Checkpoint,
    rounding: float = LAST_BITS,
    rules: str = "",
) -> Written:
    """Write one ONNX file and check it by the rules of its target, or of another.

    That ONNX Runtime computes all of it in int8 is asked of float32 files with matrix products: its convolutions
    must have int8 outputs, and its CPU kernels compute float16 in float32.
    """
    path = folder / file_name(target)
    write_onnx(graph, path)
    records = source.checkpoint.manifest.layers.items()
    verify(graph, {name: record.pattern for name, record in records if record.pattern}, known_target(rules or target))
    matrices = target != "tensorrt" or source.config.tensorrt.layers == "matmul"
    if matrices and rounding == LAST_BITS and (float_products := left_in_float(optimized_graph(path))):
        raise GateError(f"ONNX Runtime would run {float_products[0]} of {path.name} in float",
                        "this is a fault of the exporter: please report it with the recipe")  # fmt: skip
    tables = stored_tables(source.graph, source.config.embeddings)
    return Written(replace(reference, weights={**reference.weights, **tables}), rounding)


def write_semi_structured(source: Source, folder: Path) -> Written:
    """Packed 2:4 weights; what a runtime for linears alone leaves out keeps its fake quantizers in the loader."""
    write_files(write_packed(source.checkpoint), folder)
    layers = source.checkpoint.manifest.layers.values()
    half = any(record.pattern and not record.quantized for record in layers)
    return Written(source.checkpoint, HALF_BITS if half else LAST_BITS)


def write_compressed_tensors(source: Source, folder: Path) -> Written:
    """Int8 weights and input scales for transformers; sites that are no linear's input are not in it."""
    files, notes = write_compressed(source.checkpoint)
    manifest = source.checkpoint.manifest
    pruned = {name: record.pattern for name, record in manifest.layers.items() if record.pattern}
    if broken := check_contents({name.partition("/")[2]: content for name, content in files.items()}, pruned):
        raise GateError(f"the compressed-tensors folder breaks rule C22: {broken[0]}", "nothing was written")
    write_files(files, folder)
    sites = {site: record for site, record in manifest.sites.items() if site.endswith(":input")}
    known = manifest.model_copy(update={"sites": sites})
    amax = {record.leader: source.checkpoint.amax[record.leader] for record in sites.values()}
    return Written(replace(source.checkpoint, manifest=known, amax=amax), LAST_BITS, tuple(notes))


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files of folders in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def with_embeddings(source: Source, graph: ModelProto, widened: Widened = "rows") -> ModelProto:
    """The graph with its embedding tables stored as the recipe says."""
    form = source.config.embeddings
    return graph if form == "fp32" else store_embeddings(graph, form, widened)


def float_reference(source: Source) -> Checkpoint:
    """The checkpoint without its quantizers."""
    return replace(source.checkpoint, amax={})


def quantization_of(checkpoint: Checkpoint, target: str) -> Quantization:
    """Int8 weights and bounds of a calibrated checkpoint."""
    if not checkpoint.amax:
        raise SqatError(f"target {target} needs activation scales", "put a calibrate stage before, or export onnx-fp32")
    weights = {name: quantize_weight(checkpoint.weights[f"{name}.weight"]) for name in quantized_layers(checkpoint)}
    sites = checkpoint.manifest.sites.items()
    return Quantization(weights, {site: float(checkpoint.amax[record.leader]) for site, record in sites})


def prove(artifact: Path, written: Written, dev: Rows, config: ExportConfig, job: Job) -> tuple[Parity, Figures]:
    """Run what was written on dev rows, compare it with the torch model it came from, and measure it.

    Raises:
        GateError: a logit differs by more than rounding explains, or more decisions than the recipe allows.
    """
    forward, task = open_artifact(artifact, "cpu"), job.task
    with served_model(written.reference) as (model, tokenizer):
        some = whole_groups(dev, config.parity_samples)
        wanted = predict(partial(logits_of, model), some, tokenizer)
        with rounded_otherwise(model, written.rounding):
            noise = parity(wanted.numpy(), predict(partial(logits_of, model), some, tokenizer).numpy())
    got = predict(forward, dev, tokenizer)
    part = got[: len(some)]
    equal = task.agreement(wanted, part, some)
    found = Parity(len(equal), parity(wanted.numpy(), part.numpy()), noise, equal.float().mean().item())
    if found.difference > NOISE_FACTOR * noise + slack(wanted) / 100:
        raise GateError(
            f"{artifact.name} is off by {found.difference:.2e} in a logit, more than rounding explains "
            f"(torch rounded otherwise: {noise:.2e})",
            "nothing was written",
        )
    if 1 - found.agreement > config.max_disagreement:
        raise GateError(
            f"{artifact.name} decides otherwise than the torch model in {1 - found.agreement:.2%} of "
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


TARGETS: dict[str, Callable[[Source, Path], Written]] = {
    "onnx-int8": write_int8,
    "onnx-fp32": write_fp32,
    "onnx-fp16": write_fp16,
    "tensorrt": write_tensorrt,
    "torch-semi-structured": write_semi_structured,
    "compressed-tensors": write_compressed_tensors,
}
