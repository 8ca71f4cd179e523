"""Target `cpu-sparse`: packed 2:4 weights and int8 attention for the kernels of `sqat.runtime` on ordinary CPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqat.errors import GateError
from sqat.export.cpu.encoder import Encoder, read_encoder
from sqat.export.cpu.graph import to_cpu_sparse
from sqat.export.embeddings import stored_tables
from sqat.export.source import Source, TargetFile
from sqat.export.targets.compressed_tensors import check_pattern
from sqat.onnx_files.checks import check_file
from sqat.onnx_files.write import write_onnx

USAGE = """```python
import sqat.runtime
{inputs}
session = sqat.runtime.session("{file}")  # an onnxruntime.InferenceSession with sqat's kernels
names = [entry.name for entry in session.get_inputs()]
(output,) = session.run(None, {{name: inputs[name] for name in names}})  # {output}
```
"""


def write(source: Source, path: Path) -> TargetFile:
    """Write the ONNX file; the linter has no rules for it, so ONNX's own checks stand in."""
    encoder, int8_words = encoder_of(source), source.config.embeddings == "int8"
    write_onnx(to_cpu_sparse(source.graph, encoder, int8_words), path)
    if faults := list(check_file(path)):
        raise GateError(f"{path.name} is no valid ONNX: {faults[0]}", "please report it with the recipe",
                        code="invalid-onnx")  # fmt: skip
    word = f"{encoder.base}embeddings.word_embeddings.weight"
    tables = {word: stored_tables(source.graph, "int8")[word]} if int8_words else {}
    return TargetFile(replace(source.checkpoint, weights={**source.checkpoint.weights, **tables}))


def encoder_of(source: Source) -> Encoder:
    """Read the encoder, whose integers must keep the pattern of their layer."""
    layers = source.checkpoint.manifest.layers
    for name, (integers, _) in source.quantized.weights.items():
        if (pattern := layers[name].pattern) and (broken := next(check_pattern(name, integers, pattern), None)):
            raise GateError(f"the exported integers break rule B6: {broken}", "nothing was written", code="broken-rule")
    return read_encoder(source.model, source.quantized)
