"""A trained model of one's own as an ONNX file, checked by the rules of its target and run once."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from onnx import ModelProto
from torch import Tensor, nn

from sqat.api.choices import Inputs, check_masks, check_plain, model_inputs
from sqat.api.pruning import Masks
from sqat.api.quantizing import Scales, check_scales, quantized
from sqat.data.dataset import Batch
from sqat.errors import SqatError
from sqat.evaluation.artifacts import open_artifact
from sqat.export.folding import fold_attention_scale
from sqat.export.graph import export_float
from sqat.export.onnx_files import on_disk, write_onnx
from sqat.export.qdq import Quantization, insert_qdq
from sqat.lint.apply_rules import verify
from sqat.models.attention import use_eager
from sqat.quantization.fake_quant import quantize_weight
from sqat.recipe.cross_checks import suggest
from sqat.recipe.stages import FLOAT_OUTPUTS
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
    """Write a model as ONNX, batch and sequence free, and compare the file with torch; the model stays as it is.

    Args:
        path: of the file; weights over 2 GB go beside it.
        inputs: a batch, for the names of the inputs and to compare with; ``labels`` are left out.
        masks: of `prune`; the pruned weights must be 0.
        scales: of `calibrate`; None for a float graph.
        target: ``onnx-fp32``, ``onnx-int8`` or ``tensorrt``, whose rules the file must keep; default: by ``scales``.

    Returns:
        The largest difference between logits of the file, in ONNX Runtime, and of the (fake-quantized) torch model.
        A few int8 steps more or less are rounding; whether it matters, an export stage proves on real rows.

    Raises:
        SqatError: masks that the weights do not keep, scales that are not this model's or that the target cannot take,
            or a model that still has masks or quantizers.
        GateError: the graph breaks a rule of its target; nothing is written.
    """
    check_plain(model)
    target = chosen_target(target, scales)
    copy = deepcopy(model).cpu().eval()
    use_eager(copy)
    if masks is not None:
        check_masks(copy, masks.kept)
        check_zeros(copy, masks)
    example = model_inputs(inputs, torch.device("cpu"))
    if scales is not None:
        check_scales(copy, scales)
    graph = export_float(copy, example)
    if scales is not None:
        graph = insert_qdq(graph, quantization(copy, scales))
    if target == "tensorrt":
        graph = fold_attention_scale(graph)
    check_graph(graph, masks, target)
    write_onnx(graph, Path(path))
    return difference(Path(path), copy, example, scales)


def chosen_target(target: Target | None, scales: Scales | None) -> Target:
    """The target asked for, or the one that the scales are for."""
    if target is None:
        return "onnx-fp32" if scales is None else "onnx-int8" if scales.placement in FLOAT_OUTPUTS else "tensorrt"
    if target not in TARGETS:
        raise SqatError(f"there is no target {target!r}", suggest(str(target), TARGETS), code="unknown-name")
    if (scales is None) != (target == "onnx-fp32"):
        raise SqatError(f"target {target} {'needs' if scales is None else 'takes no'} scales", "see sqat.calibrate")
    if target == "tensorrt" and scales is not None and scales.placement in FLOAT_OUTPUTS:
        raise SqatError(f"target tensorrt needs scales of linears' outputs, which placement {scales.placement} has not",
                        "calibrate with placement='tensorrt'")  # fmt: skip
    return target


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Pruned weights must be zeros, or the masks did not hold while the model was trained."""
    for name, mask in masks.kept.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if grown := int((weight[~mask.cpu()] != 0).sum()):
            raise SqatError(f"{grown} pruned weights of {name} are not 0", "train inside sqat.masked or sqat.quantized")


def quantization(model: nn.Module, scales: Scales) -> Quantization:
    """Int8 weights, and bounds of every site that ONNX operators have."""
    weights = {}
    for name in scales.layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weights[name] = quantize_weight(weight.detach())
    return Quantization(
        weights, {site: float(scales.amax[leader]) for site, leader in sites_of(scales).leaders.items()}
    )


def sites_of(scales: Scales) -> Scales:
    """The scales without what only the kernels of target cpu-sparse compute, as placement ``linear`` has them."""
    if scales.placement != "cpu":
        return scales
    leaders = {site: leader for site, leader in scales.leaders.items() if site.endswith(":input")}
    amax = {leader: scales.amax[leader] for leader in leaders.values()}
    return replace(scales, leaders=leaders, amax=amax, placement="linear")


def check_graph(graph: ModelProto, masks: Masks | None, target: Target) -> None:
    """Refuse a graph that breaks a rule of its target before anything stands in the user's folder."""
    with on_disk(graph) as path:
        verify(graph, {} if masks is None else dict(masks.patterns), target, path)


def difference(path: Path, model: nn.Module, example: Inputs, scales: Scales | None) -> float:
    """Largest difference between the logits of a file and of its plain torch model."""
    none = torch.empty(0)
    found = open_artifact(path, "cpu")(Batch(dict(example), none, none))
    with torch.no_grad():
        if scales is None:
            wanted = model(**example).logits
        else:
            with quantized(model, None, sites_of(scales)):
                wanted = model(**example).logits
    return parity(wanted.numpy(), found.numpy())


TARGETS: tuple[Target, ...] = ("onnx-fp32", "onnx-int8", "tensorrt")
