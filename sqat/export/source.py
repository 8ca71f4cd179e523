"""What a target is written from, and what it says about the file that it wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from onnx import ModelProto
from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint
from sqat.export.embeddings import store_embeddings, stored_tables
from sqat.export.graph import export_float
from sqat.export.int8_products import keep_int8
from sqat.export.quantized_model import QuantizedModel, quantize_model
from sqat.export.traced_graphs import TracedGraphs
from sqat.onnx_files.write import write_onnx
from sqat.quantization.fake_quant import FP32_NOISE
from sqat.recipe.stages import ExportConfig

FP16_NOISE = 2.0**-11  # relative rounding error of a float16 operation


@dataclass(frozen=True)
class Source:
    """One model for all targets of an export.

    Attributes:
        checkpoint: the parent, with weights, masks and amax.
        model: the same model, in eval mode on the CPU, with eager attention.
        inputs: an example batch by input name.
        sequence: smallest, usual and largest number of tokens.
        output: name of an ONNX file's output.
        graphs: float graphs that were traced before; None to trace this model itself.
    """

    checkpoint: Checkpoint
    model: nn.Module
    inputs: dict[str, Tensor]
    config: ExportConfig
    sequence: tuple[int, int, int]
    output: str = "logits"
    graphs: TracedGraphs | None = None

    @cached_property
    def graph(self) -> ModelProto:
        """The float graph."""
        export = export_float if self.graphs is None else self.graphs.export
        return export(self.model, self.inputs, self.output)

    @cached_property
    def quantized(self) -> QuantizedModel:
        """The model in int8."""
        return quantize_model(self.checkpoint)

    @property
    def float_checkpoint(self) -> Checkpoint:
        """The checkpoint without its quantizers."""
        return replace(self.checkpoint, amax={})

    @property
    def portable_checkpoint(self) -> Checkpoint:
        """The checkpoint without the quantizers that only the kernels of target cpu-sparse compute."""
        return input_sites_only(self.checkpoint) if self.checkpoint.manifest.placement == "cpu" else self.checkpoint


@dataclass(frozen=True)
class TargetFile:
    """A file or folder that a target wrote.

    Attributes:
        reference: the checkpoint whose torch model must compute the same.
        rounding: relative rounding error of one operation in the file.
        notes: what the target cannot express.
        graph: the ONNX graph to check by ``rules``; None where the target checks its own files.
        rules: the linter's target.
        runs_in_int8: ONNX Runtime must compute every product with a weight in int8.
    """

    reference: Checkpoint
    rounding: float = FP32_NOISE
    notes: tuple[str, ...] = ()
    graph: ModelProto | None = None
    rules: str = ""
    runs_in_int8: bool = False


def input_sites_only(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as placement ``linear`` has it: only inputs of linears are quantized."""
    sites = {site: record for site, record in checkpoint.manifest.sites.items() if site.endswith(":input")}
    manifest = checkpoint.manifest.model_copy(update={"sites": sites, "placement": "linear"})
    amax = {record.shared_with: checkpoint.amax[record.shared_with] for record in sites.values()}
    return replace(checkpoint, manifest=manifest, amax=amax)


def shrink_embeddings(source: Source, graph: ModelProto, widen: Literal["rows", "table"] = "rows") -> ModelProto:
    """Store the embedding tables of a graph as the recipe says."""
    form = source.config.embeddings
    return graph if form == "fp32" else store_embeddings(graph, form, widen)


def write_graph(
    source: Source,
    path: Path,
    graph: ModelProto,
    reference: Checkpoint,
    rules: str,
    *,
    rounding: float = FP32_NOISE,
    runs_in_int8: bool = True,
) -> TargetFile:
    """Write an ONNX file; its reference gets the embedding tables that the file stores."""
    graph = keep_int8(graph)
    write_onnx(graph, path)
    tables = stored_tables(source.graph, source.config.embeddings)
    stored = replace(reference, weights={**reference.weights, **tables})
    return TargetFile(stored, rounding, graph=graph, rules=rules, runs_in_int8=runs_in_int8)
