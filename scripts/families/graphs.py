"""Export each float graph once: placements and targets of one family share it, and it takes most of the time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

from onnx import ModelProto
from torch import Tensor, nn

from sqat.export import graph, source, traced_graphs


@contextmanager
def shared_graphs() -> Iterator[None]:
    """Trace each architecture once, as rehearsals do, and fill in the weights of each model."""
    known: dict[str, bytes | Exception] = {}

    def export_once(model: nn.Module, inputs: Mapping[str, Tensor], output: str = "logits") -> ModelProto:
        key = digest(model, inputs, output)
        if key not in known:
            try:
                known[key] = graph.export_float(model, inputs, output).SerializeToString()
            except Exception as error:
                known[key] = error
        first = known[key]
        if isinstance(first, Exception):
            raise first
        copy: ModelProto = ModelProto.FromString(first)
        return copy

    with (
        patch.object(traced_graphs, "export_float", export_once),
        patch.object(source, "export_float", traced_graphs.TracedGraphs().export),
    ):
        yield


def digest(model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> str:
    """Return a digest of all that a float graph depends on: modules, weights, and widths of inputs."""
    hasher = hashlib.sha256(f"{model} {getattr(model, 'config', '')} {output}".encode())
    for name, tensor in inputs.items():
        hasher.update(f"{name} {tensor.dtype} {graph.example_rows(name, tensor).shape}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return hasher.hexdigest()
