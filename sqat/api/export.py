"""Export a trained model as an ONNX file, check the file by the rules of its target, and run it once."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sqat.api.arguments import Inputs, check_masks, check_unchanged, model_inputs
from sqat.api.prune import Masks
from sqat.api.quantize import Scales, check_scales, quantized
from sqat.errors import SqatError, suggest
from sqat.evaluation.artifacts import open_onnx
from sqat.export.folding import fold_attention_scale
from sqat.export.graph import export_float
from sqat.export.int8_products import keep_int8
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import verify
from sqat.models.attention import use_eager
from sqat.models.conv1d import to_linears_
from sqat.modules.outputs import tensor_outputs
from sqat.modules.parametrize import get_layer
from sqat.onnx_files.write import on_disk, write_onnx
from sqat.quantization.fake_quant import quantize_weight
from sqat.quantization.placement import PLACEMENTS
from sqat.runtime.sessions import parity

Target = Literal["onnx-fp32", "onnx-int8", "tensorrt"]


def export_onnx(
    model: nn.Module,
    path: Path | str,
    inputs: Inputs,
    masks: Masks | None = None,
    scales: Scales | None = None,
    target: Target | None = None,
) -> float:
    """Write a model as ONNX, with dynamic batch and sequence, and compare it with torch; the model stays as it is.

    The file has every tensor that the model returns, under the name of its field, in float32: a model in half precision
    is converted first.

    Args:
        path: of the file; weights over 2 GB go beside it.
        inputs: a batch, for the names of the inputs and to compare with; labels are ignored.
        masks: of `prune`; the pruned weights must be 0.
        scales: of `calibrate`; None for a float graph.
        target: ``onnx-fp32``, ``onnx-int8`` or ``tensorrt``, whose rules the file must keep; default: by ``scales``.

    Returns:
        The largest difference between outputs of the file, in ONNX Runtime, and of the (fake-quantized) torch model.
        A few int8 steps are rounding; an export stage of a recipe decides on real rows whether they matter.

    Raises:
        SqatError: pruned weights that are not 0, scales of another model or that the target cannot take, or a model
            that still has masks or quantizers; a path that cannot be written.
        GateError: the graph breaks a rule of its target; nothing is written.
    """
    check_unchanged(model)
    target, path = choose_target(target, scales), prepare_path(Path(path))
    copy = make_float_copy(model)
    if masks is not None:
        check_masks(copy, masks.kept)
        check_zeros(copy, masks)
    example = model_inputs(inputs, torch.device("cpu"))
    example = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in example.items()}
    if scales is not None:
        check_scales(copy, scales)
    graph = export_float(copy, example, None)
    if scales is not None:
        graph = insert_qdq(graph, quantize_for_onnx(copy, scales), join_outputs=target == "onnx-int8")
    if target == "tensorrt":
        graph = fold_attention_scale(graph)
    graph = keep_int8(graph)
    patterns = {} if masks is None else dict(masks.patterns)
    with on_disk(graph) as scratch:  # before anything is in the user's folder
        verify(graph, patterns, target, scratch)
    try:
        write_onnx(graph, path)
    except OSError as error:
        raise unwritable(path, error) from error
    return output_difference(path, copy, example, scales)


def make_float_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU, in float32 and eval mode, with eager attention and named outputs."""
    copy = deepcopy(model).cpu().float().eval()
    use_eager(copy)
    to_linears_(copy)
    config: Any = getattr(copy, "config", None)
    if hasattr(config, "return_dict"):
        config.return_dict = True
    return copy


def prepare_path(path: Path) -> Path:
    """Create the folder of a file to be written, and return the path.

    Raises:
        SqatError: the path is a folder, or its folder cannot be created.
    """
    if path.is_dir():
        raise SqatError("is a folder", "give the name of a file in it", str(path), code="unwritable-file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def unwritable(path: Path, error: OSError) -> SqatError:
    """Make the error of a file that cannot be written."""
    return SqatError(f"cannot be written: {error.strerror or error}", "free space, or choose another place",
                     str(path), code="unwritable-file")  # fmt: skip


def choose_target(target: Target | None, scales: Scales | None) -> Target:
    """Return the target that is asked for, or the one that the scales are for."""
    if target is None:
        return "onnx-fp32" if scales is None else "tensorrt" if PLACEMENTS[scales.placement].outputs else "onnx-int8"
    if target not in TARGETS:
        raise SqatError(f"there is no target {target!r}", suggest(str(target), TARGETS), code="unknown-name")
    if (scales is None) != (target == "onnx-fp32"):
        raise SqatError(f"target {target} {'needs' if scales is None else 'takes no'} scales", "see sqat.calibrate",
                        code="usage")  # fmt: skip
    if target == "tensorrt" and scales is not None and not PLACEMENTS[scales.placement].outputs:
        raise SqatError("target tensorrt needs scales of the outputs of linears, which placement "
                        f"{scales.placement} does not have", "calibrate with placement='tensorrt'",
                        code="usage")  # fmt: skip
    return target


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Raise unless pruned weights are 0, as they are where the masks held during training."""
    for name, mask in masks.kept.items():
        if grown := int((get_layer(model, name).weight[~mask.cpu()] != 0).sum()):
            raise SqatError(f"{grown} pruned weights of {name} are not 0", "train inside sqat.masked or sqat.quantized",
                            code="model-mismatch")  # fmt: skip


def quantize_for_onnx(model: nn.Module, scales: Scales) -> QuantizedModel:
    """Int8 weights, and the amax of every site that ONNX operators have."""
    weights = {name: quantize_weight(get_layer(model, name).weight.detach()) for name in scales.layers}
    shared_with = drop_kernel_sites(scales).shared_with
    return QuantizedModel(weights, {site: float(scales.amax[owner]) for site, owner in shared_with.items()})


def drop_kernel_sites(scales: Scales) -> Scales:
    """Scales of placement ``linear``: without sites that only the kernels of target cpu-sparse quantize."""
    if not PLACEMENTS[scales.placement].kernels:
        return scales
    shared_with = {site: owner for site, owner in scales.shared_with.items() if site.endswith(":input")}
    amax = {owner: scales.amax[owner] for owner in shared_with.values()}
    return replace(scales, shared_with=shared_with, amax=amax, placement="linear")


def output_difference(path: Path, model: nn.Module, example: Inputs, scales: Scales | None) -> float:
    """The largest difference between the outputs of a file and of its torch model."""
    runtime = open_onnx(path)
    arrays = {entry.name: example[entry.name].numpy() for entry in runtime.get_inputs()}
    names = [entry.name for entry in runtime.get_outputs()]
    fake_quantized = nullcontext() if scales is None else quantized(model, None, drop_kernel_sites(scales))
    with torch.no_grad(), fake_quantized:
        expected = tensor_outputs(model(**example))
    actual = dict(zip(names, runtime.run(names, arrays), strict=True))
    return max(parity(expected[name].numpy(), actual[name]) for name in names)


TARGETS: tuple[Target, ...] = ("onnx-fp32", "onnx-int8", "tensorrt")
