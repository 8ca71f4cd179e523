"""The export targets: from a checkpoint and its float graph to the files of an engine.

What: a target writes into a folder and says which torch model its files must agree with, and how coarsely they round;
`sqat.stages.export` then runs them and compares. ONNX files are checked there by the rules of their target.

Left out: engines, which `sqat engine` builds from the file of the target ``tensorrt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from onnx import ModelProto
from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint, quantized_layers
from sqat.errors import GateError, SqatError
from sqat.export.build_recipe import build_files
from sqat.export.compressed import check_contents, check_pattern, write_compressed
from sqat.export.conv1x1 import to_conv1x1
from sqat.export.cpu_encoder import Encoder, check_encoder, read_encoder
from sqat.export.cpu_graph import to_cpu_sparse
from sqat.export.embeddings import Widened, store_embeddings, stored_tables
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.graph import export_float
from sqat.export.onnx_files import check_file, write_onnx
from sqat.export.opset17 import to_opset17
from sqat.export.packed import write_packed
from sqat.export.qdq import Quantization, insert_qdq
from sqat.quantization.fake_quant import LAST_BITS, quantize_weight
from sqat.recipe.stages import FLOAT_OUTPUTS, ExportConfig
from sqat.recipe.targets import TARGETS as SPECS

HALF_BITS = 2.0**-11


@dataclass(frozen=True)
class Source:
    """What a target is written from.

    Attributes:
        checkpoint: the parent, with weights, masks and bounds.
        model: built from it, in eval mode on the CPU, eager attention.
        inputs: an example batch by input name.
        sequence: smallest, usual and largest number of tokens.
        output: name of the output of an ONNX file.
    """

    checkpoint: Checkpoint
    model: nn.Module
    inputs: dict[str, Tensor]
    config: ExportConfig
    sequence: tuple[int, int, int]
    output: str = "logits"

    @cached_property
    def graph(self) -> ModelProto:
        """The float graph, traced once for all targets."""
        return export_float(self.model, self.inputs, self.output)


@dataclass(frozen=True)
class Written:
    """What a target wrote, and what it must agree with.

    Attributes:
        reference: the checkpoint whose torch model computes the same.
        rounding: relative error of one operation in the written form.
        notes: what the target could not express.
        graph: what `sqat.lint` is to check by ``rules``; None where the target checked its files itself.
        rules: the target whose rules hold.
        runs_in_int8: whether ONNX Runtime must compute all products with a weight in int8.
    """

    reference: Checkpoint
    rounding: float = LAST_BITS
    notes: tuple[str, ...] = ()
    graph: ModelProto | None = None
    rules: str = ""
    runs_in_int8: bool = False


def write_fp32(source: Source, folder: Path) -> Written:
    """The float graph as it is, weights with their zeros."""
    return write_graph(source, "onnx-fp32", with_embeddings(source, source.graph), folder, float_reference(source))


def write_fp16(source: Source, folder: Path) -> Written:
    """The float graph in float16, weights with their zeros; scores are scaled before the product, where they fit."""
    graph = to_float16(fold_attention_scale(with_embeddings(source, source.graph, "table")))
    return write_graph(source, "onnx-fp16", graph, folder, float_reference(source), HALF_BITS)


def write_int8(source: Source, folder: Path) -> Written:
    """Q/DQ pairs at every site and int8 weights."""
    checkpoint = for_any_runtime(source.checkpoint)
    graph = with_embeddings(source, insert_qdq(source.graph, quantization_of(checkpoint, "onnx-int8")))
    return write_graph(source, "onnx-int8", graph, folder, checkpoint)


def write_tensorrt(source: Source, folder: Path) -> Written:
    """Int8 in and out of every linear, in the flavour asked for, and what builds an engine of it."""
    options, config = source.config.tensorrt, source.config
    if (placement := source.checkpoint.manifest.placement) in FLOAT_OUTPUTS:
        raise SqatError(
            "target tensorrt needs the scales of the linears' outputs, and the checkpoint was calibrated with "
            f"placement {placement}",
            "set stages.calibrate.placement: tensorrt",
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
    made = build_files(SPECS["tensorrt"].file, inputs=shapes, batch=config.batch_range, sequence=source.sequence,
                       precision=options.precision, layers=options.layers, weights=options.weights)  # fmt: skip
    write_files(made, folder)
    return written


def write_cpu_sparse(source: Source, folder: Path) -> Written:
    """Packed 2:4 weights and int8 attention for the kernels of `sqat.runtime`, which ordinary CPUs run."""
    checkpoint, path = source.checkpoint, folder / SPECS["cpu-sparse"].file
    form = source.config.embeddings
    if form == "fp16":
        raise SqatError("target cpu-sparse stores word embeddings as fp32 or int8, not fp16", "set embeddings: int8")
    encoder = encoder_of(checkpoint, source.model)
    write_onnx(to_cpu_sparse(source.graph, encoder, form == "int8"), path)
    if faults := list(check_file(path)):
        raise GateError(f"{path.name} is no valid ONNX: {faults[0]}", "please report it with the recipe")
    word = f"{encoder.base}embeddings.word_embeddings.weight"
    tables = {word: stored_tables(source.graph, "int8")[word]} if form == "int8" else {}
    return Written(replace(checkpoint, weights={**checkpoint.weights, **tables}))


def encoder_of(checkpoint: Checkpoint, model: nn.Module) -> Encoder:
    """The encoder of a checkpoint that was calibrated for the CPU's kernels."""
    manifest = checkpoint.manifest
    check_encoder(model)
    if manifest.placement != "cpu":
        made = f"was calibrated with placement {manifest.placement}" if manifest.placement else "is not calibrated"
        raise SqatError(f"target cpu-sparse needs the scales of placement cpu, and the checkpoint {made}",
                        "set stages.calibrate.placement: cpu, or export onnx-int8")  # fmt: skip
    for name, pattern in ((name, record.pattern) for name, record in manifest.layers.items() if record.pattern):
        weight, _ = quantize_weight(checkpoint.weights[f"{name}.weight"])
        if broken := next(check_pattern(name, weight, pattern), None):
            raise GateError(f"the exported integers break rule B6: {broken}", "nothing was written")
    bounds = {site: float(checkpoint.amax[record.shared_with]) for site, record in manifest.sites.items()}
    return read_encoder(model, quantized_layers(checkpoint), bounds)


def write_graph(
    source: Source,
    target: str,
    graph: ModelProto,
    folder: Path,
    reference: Checkpoint,
    rounding: float = LAST_BITS,
    rules: str = "",
) -> Written:
    """Write one ONNX file, to be checked by the rules of its target, or of another.

    That ONNX Runtime computes all of it in int8 is asked of float32 files with matrix products: its convolutions
    must have int8 outputs, and its CPU kernels compute float16 in float32.
    """
    path = folder / SPECS[target].file
    write_onnx(graph, path)
    matrices = target != "tensorrt" or source.config.tensorrt.layers == "matmul"
    tables = stored_tables(source.graph, source.config.embeddings)
    stored = replace(reference, weights={**reference.weights, **tables})
    in_int8 = matrices and rounding == LAST_BITS
    return Written(stored, rounding, graph=graph, rules=rules or target, runs_in_int8=in_int8)


def write_semi_structured(source: Source, folder: Path) -> Written:
    """Packed 2:4 weights; what a runtime for linears alone leaves out keeps its fake quantizers in the loader."""
    checkpoint = for_any_runtime(source.checkpoint)
    write_files(write_packed(checkpoint), folder)
    half = any(record.pattern and not record.quantized for record in checkpoint.manifest.layers.values())
    return Written(checkpoint, HALF_BITS if half else LAST_BITS)


def write_compressed_tensors(source: Source, folder: Path) -> Written:
    """Int8 weights and input scales for transformers; sites that are no linear's input are not in it."""
    files, notes = write_compressed(source.checkpoint)
    manifest = source.checkpoint.manifest
    pruned = {name: record.pattern for name, record in manifest.layers.items() if record.pattern}
    if broken := check_contents({name.partition("/")[2]: content for name, content in files.items()}, pruned):
        raise GateError(f"the compressed-tensors folder breaks rule C22: {broken[0]}", "nothing was written")
    write_files(files, folder)
    return Written(with_linear_sites(source.checkpoint), LAST_BITS, tuple(notes))


def for_any_runtime(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without what only the kernels of target cpu-sparse compute: attention products in their bytes."""
    return with_linear_sites(checkpoint) if checkpoint.manifest.placement == "cpu" else checkpoint


def with_linear_sites(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as placement ``linear`` has it: only the inputs of linears are quantized."""
    sites = {site: record for site, record in checkpoint.manifest.sites.items() if site.endswith(":input")}
    known = checkpoint.manifest.model_copy(update={"sites": sites, "placement": "linear"})
    amax = {record.shared_with: checkpoint.amax[record.shared_with] for record in sites.values()}
    return replace(checkpoint, manifest=known, amax=amax)


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files of folders in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
    return Quantization(weights, {site: float(checkpoint.amax[record.shared_with]) for site, record in sites})


TARGETS: dict[str, Callable[[Source, Path], Written]] = {
    "onnx-int8": write_int8,
    "onnx-fp32": write_fp32,
    "onnx-fp16": write_fp16,
    "tensorrt": write_tensorrt,
    "cpu-sparse": write_cpu_sparse,
    "torch-semi-structured": write_semi_structured,
    "compressed-tensors": write_compressed_tensors,
}
