"""Open whatever an export wrote as a function from batches to logits, on this machine.

An ONNX file runs in ONNX Runtime, a semi-structured folder in its sparse linears, and a compressed-tensors folder as
integers times scales with rounded inputs (transformers would need another package).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqat.checkpoint.manifest import SIDE_FILES, WEIGHTS
from sqat.checkpoint.store import read_tensors
from sqat.data.batch import Batch
from sqat.errors import SqatError, first_line
from sqat.evaluation.inference import logits_of, move_to_device
from sqat.export.names import file_needs_kernels
from sqat.export.packed_folder import MANIFEST as PACKED
from sqat.export.targets.compressed_tensors import check_compressed
from sqat.files.read import read_bytes, read_json
from sqat.models.loading import assemble, load_weights
from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_
from sqat.quantization.fake_quant import HIGH
from sqat.runtime.sessions import run_batches, session
from sqat.torch_sparse.load import load_model

CONFIG = "config.json"
Forward = Callable[[Batch], Tensor]


def config_of(artifact: Path) -> Path:
    """Find the config.json that describes an ONNX file or a folder."""
    return artifact.with_name(CONFIG) if artifact.suffix == ".onnx" else artifact / CONFIG


def is_export(folder: Path) -> bool:
    """Whether an export wrote a folder for a runtime; False for a checkpoint."""
    return (folder / PACKED).is_file() or "quantization_config" in read_config(folder / CONFIG)


def open_artifact(artifact: Path, device: str | None = None) -> Forward:
    """Open an exported file or folder.

    Args:
        device: of a semi-structured folder; None takes a GPU and its sparse kernels if there is one.

    Returns:
        A function from a batch to logits [B,C] float32.

    Raises:
        SqatError: the artifact cannot be read or run here.
    """
    if artifact.suffix == ".onnx":
        return partial(onnx_logits, open_onnx(artifact), str(artifact))
    if (artifact / PACKED).is_file():
        model, _ = load_model(artifact, device)
        return partial(logits_of, model)
    return partial(logits_of, open_compressed(artifact))


def open_onnx(path: Path, threads: int = 0) -> Any:
    """Open an ONNX Runtime session of a file, with the compiled kernels if it needs them.

    Args:
        threads: of one operator; 0 for one per core.

    Raises:
        SqatError: the file cannot be loaded, or the kernels are missing.
    """
    if not file_needs_kernels(path):
        return session(path, threads=threads)
    from sqat import runtime  # only such a file needs what is compiled

    runtime.instruction_set()
    try:
        return runtime.session(path, threads=threads)
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        raise SqatError(f"ONNX Runtime cannot load the model: {first_line(error)}", place=str(path),
                        code="invalid-onnx") from error  # fmt: skip


def onnx_logits(runtime: Any, place: str, batch: Batch) -> Tensor:
    """Compute logits [B,C] of one batch by an ONNX Runtime session.

    Raises:
        SqatError: the model reads another input, or cannot be run.
    """
    arrays: Mapping[str, np.ndarray] = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    if unknown := [entry.name for entry in runtime.get_inputs() if entry.name not in arrays]:
        problem = f"reads the input {unknown[0]!r}; the rows of this task have {', '.join(arrays)}"
        raise SqatError(problem, "use the recipe that the model was trained with", place, code="model-mismatch")
    try:
        return torch.from_numpy(run_batches(runtime, [arrays]))
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        problem = f"ONNX Runtime cannot run the model: {first_line(error)}"
        raise SqatError(problem, "export it again", place, code="invalid-onnx") from error


def open_compressed(folder: Path) -> nn.Module:
    """Build the model of a compressed-tensors folder, with its integers and rounded inputs.

    Raises:
        SqatError: the folder breaks rule C22.
    """
    if broken := check_compressed(folder):
        raise SqatError(f"the compressed-tensors folder breaks rule C22: {broken[0]}", "export it again", str(folder),
                        code="broken-rule")  # fmt: skip
    config = read_config(folder / CONFIG)
    config.pop("quantization_config", None)
    paths = [path for path in folder.rglob("*") if path.suffix in SIDE_FILES]
    files = {path.relative_to(folder).as_posix(): read_bytes(path) for path in paths}
    model, _ = move_to_device(*assemble({**files, CONFIG: json.dumps(config).encode()}, str(folder)))
    tensors = read_tensors(folder / WEIGHTS)
    endings = (".weight_scale", ".input_scale")  # a model may have scales of its own
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(endings)}
    amax = {}
    for name in [name for name in scales if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float() * scales[name]
        amax[f"{layer}:input"] = scales[f"{layer}.input_scale"].reshape(()) * HIGH
    load_weights(model, tensors, str(folder))
    insert_quantizers_(model, Quantizers(amax, {site: site for site in amax}), [])
    return model


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json; empty where there is none."""
    config = read_json(path) if os.path.lexists(path) else {}
    return config if isinstance(config, dict) else {}
