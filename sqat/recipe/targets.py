"""The export targets: what recipes, plans and machines must know of each, in one literal table.

Nothing heavy is imported here. The module of a target writes its files (`sqat.export.targets`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One export target.

    Attributes:
        file: the file or folder that it writes beside the manifest.
        module: has ``write(source, folder)`` and ``USAGE``, as `sqat.export.targets.TargetModule` says.
        needs_scales: only a calibrated model has what it stores.
        placements: of activation quantizers that it can express; empty for all.
        needs_pruning: only a pruned model gains by it.
        embeddings: types in which it can store embedding tables.
    """

    file: str
    module: str
    needs_scales: bool = False
    placements: tuple[str, ...] = ()
    needs_pruning: bool = False
    embeddings: tuple[str, ...] = ("fp32", "fp16", "int8")


# Families of encoders that the kernels of target cpu-sparse compute, by their config's model_type.
KERNEL_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
TARGETS: dict[str, Target] = {
    "onnx-int8": Target("model.int8.onnx", "sqat.export.targets.onnx_int8", needs_scales=True),
    "onnx-fp32": Target("model.fp32.onnx", "sqat.export.targets.onnx_fp32"),
    "onnx-fp16": Target("model.fp16.onnx", "sqat.export.targets.onnx_fp16"),
    "tensorrt": Target(
        "model.tensorrt.onnx",
        "sqat.export.targets.tensorrt",
        needs_scales=True,
        placements=("tensorrt", "tensorrt-full"),
    ),
    "cpu-sparse": Target(
        "model.cpu-sparse.onnx",
        "sqat.export.targets.cpu_sparse",
        needs_scales=True,
        placements=("cpu",),
        embeddings=("fp32", "int8"),
    ),
    "torch-semi-structured": Target("semi-structured", "sqat.export.targets.semi_structured", needs_pruning=True),
    "compressed-tensors": Target("compressed-tensors", "sqat.export.targets.compressed_tensors", needs_scales=True),
}


def unmet_need(name: str, *, calibrated: bool, placement: str, pruned: bool) -> tuple[str, str] | None:
    """What a target needs and a model lacks, with what to do about it; None where nothing is missing.

    Args:
        placement: of the model's activation quantizers; empty where it is unknown or there are none.
    """
    target = TARGETS[name]
    if target.needs_scales and not calibrated:
        return f"target {name} needs activation scales", "add a calibrate stage before it, or export onnx-fp32"
    if placement and target.placements and placement not in target.placements:
        allowed = " or ".join(target.placements)
        problem = f"target {name} needs activation placement {allowed}, and the model is calibrated with {placement}"
        return problem, f"set the calibrate stage's placement to {target.placements[0]}, or export onnx-int8"
    if target.needs_pruning and not pruned:
        return f"target {name} needs a pruned model", "add a prune stage before it"
    return None
