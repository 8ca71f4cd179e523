"""`sqat export --target auto`: the export target that suits a machine and a model, and why.

The choice follows from compute capability, instruction set and model. Which target is fastest only `sqat bench` can
measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqat.hardware.machine import Machine
from sqat.hardware.targets import FP16_CORES, INSTALL_TENSORRT, INT8_CORES, READY, SPARSE_CORES, TARGETS, check
from sqat.hardware.targets import has_capability as has
from sqat.recipe.targets import unmet_need

if TYPE_CHECKING:
    from sqat.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class Facts:
    """What the choice depends on in a checkpoint.

    Attributes:
        pattern: N:M of the pruned layers, empty for a dense model.
        quantized: whether layers are int8.
        placement: of the activation quantizers: ``linear``, ``tensorrt``, ``tensorrt-full`` or ``cpu``.
    """

    pattern: str = ""
    quantized: bool = False
    placement: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether every mask of the pattern is a 2:4 mask, the only pattern that tensor cores skip."""
        n, _, m = self.pattern.partition(":")
        return n == "1" or (n == "2" and int(m) % 4 == 0)

    def lacks(self, target: str) -> str:
        """Return what a target needs of the model and the model does not have; empty if nothing is missing."""
        need = unmet_need(target, calibrated=self.quantized, placement=self.placement, pruned=bool(self.pattern))
        return need[0].removeprefix(f"target {target} ") if need is not None else ""


@dataclass(frozen=True)
class Choice:
    """A target, the reasons for it, and the reason against each other target."""

    target: str
    reasons: tuple[str, ...]
    others: Mapping[str, str]


def facts_of(manifest: Manifest) -> Facts:
    """Read the facts from a checkpoint's manifest."""
    patterns = {record.pattern for record in manifest.layers.values() if record.pattern}
    is_quantized = any(record.quantized for record in manifest.layers.values())
    return Facts(max(patterns, default=""), is_quantized, manifest.placement)


def choose_target(machine: Machine, facts: Facts) -> Choice:
    """Choose the export target for the machine that will run the model."""
    target, why = next(
        (name, why) for name, (suits, why) in PREFERENCE.items() if not facts.lacks(name) and suits(machine, facts)
    )
    others = {name: reason_against(name, target, machine, facts) for name in TARGETS if name != target}
    return Choice(target, (why, *advice(machine, facts, target)), others)


def reason_against(name: str, target: str, machine: Machine, facts: Facts) -> str:
    """Return why a target is not chosen: what the model lacks, what the machine lacks, or its only use."""
    if lacking := facts.lacks(name):
        return lacking
    verdict = check(name, TARGETS[name], machine)
    if verdict.state != READY and not verdict.install.startswith("pip install"):
        return f"needs {verdict.lacks}"
    return USES.get(name, f"{target} suits this machine and model better")


def advice(machine: Machine, facts: Facts, target: str) -> Iterator[str]:
    """Yield what limits the speed of the choice, and what to do about it."""
    if machine.gpu is None or not has(machine, FP16_CORES):
        if machine.gpu is not None:
            yield f"{machine.gpu} has no tensor cores, so the choice is for the CPU."
        yield from cpu_advice(machine, facts, target)
        return
    if not has(machine, SPARSE_CORES):
        if facts.pattern:
            yield f"{machine.gpu} has no sparse tensor cores (8.0 is the first): pruning brings no speed."
        return
    if facts.pattern and not facts.is_sparse:
        yield f"Tensor cores skip the zeros of 2:4 only: a model pruned {facts.pattern} runs as a dense one."
    if facts.quantized and target != "tensorrt":
        yield "For target tensorrt, set the calibrate stage's placement to tensorrt."
    yield tensorrt_advice(machine, target)


def tensorrt_advice(machine: Machine, target: str) -> str:
    """Say which TensorRT is installed, or how to install it."""
    version = machine.versions.get("tensorrt", "")
    if target == "torch-semi-structured":
        return f"TensorRT is not installed: with it ({INSTALL_TENSORRT}), onnx-fp16 is faster."
    if version.startswith("8."):
        if target != "tensorrt":
            return f"TensorRT {version} reads no file of opset 20, as this one is: upgrade to TensorRT 10."
        return (f"TensorRT {version} runs only convolutions sparse: set stages.export.tensorrt.layers to conv1x1 and "
                "weights to qdq.")  # fmt: skip
    for name, module in (("TensorRT", "tensorrt"), ("TensorRT-RTX", "tensorrt_rtx")):
        if module in machine.versions:
            return f"{name} {machine.versions[module]}".strip() + " is installed: `sqat engine` builds the engine."
    if machine.trtexec:
        return "trtexec is installed: it builds the engine, and `sqat engine --log` reads its log."
    return f"TensorRT is not installed: {INSTALL_TENSORRT}, then `sqat engine`."


def cpu_advice(machine: Machine, facts: Facts, target: str) -> Iterator[str]:
    """Yield what limits a model on a CPU."""
    processor, has_openvino = machine.processor, "openvino" in machine.versions
    if not facts.quantized:
        yield "The model is not quantized: a calibrate stage makes the smaller and faster onnx-int8 possible."
    if target == "cpu-sparse":
        yield "Serve the file in ONNX Runtime with sqat.runtime; other runtimes need onnx-int8."
        return
    if facts.pattern:
        yield "ONNX Runtime and OpenVINO multiply zeros too: pruning brings no speed on a CPU."
        if facts.quantized and facts.placement != "cpu" and processor.is_x86:
            yield "sqat's own kernels skip zeros: calibrate a BERT-type encoder with placement cpu for cpu-sparse."
    if not facts.quantized:
        return
    if processor.has_int8_dot:
        yield f"The CPU sums int8 products exactly ({', '.join(processor.int8_instructions)})."
    elif processor.is_x86:
        missing = "The CPU has no VNNI" if processor.features else "The system does not say whether the CPU has VNNI"
        yield f"{missing}: without it, int8 is little faster than fp32."
        yield ("Without VNNI, ONNX Runtime's int8 kernel saturates unless the session option "
               "session.x64quantprecision is 1; sqat sets it, and so must any other server.")  # fmt: skip
        if has_openvino:
            yield "OpenVINO's int8 kernels saturate without VNNI and have no such option: its outputs are wrong here."


def explain(machine: Machine, facts: Facts, choice: Choice) -> Iterator[tuple[str, str]]:
    """Yield machine, model, choice and reasons as paragraphs: label and text."""
    yield from machine.paragraphs()
    model = [f"pruned {facts.pattern}" if facts.pattern else "dense", "int8" if facts.quantized else "float"]
    yield "model", ", ".join([*model, *([f"placement {facts.placement}"] if facts.placement else [])])
    yield "target", choice.target
    for reason in choice.reasons:
        yield "", reason
    for number, (name, reason) in enumerate(choice.others.items()):
        yield "" if number else "others", f"{name}: {reason}"


Suits = Callable[[Machine, Facts], bool]
# In order of preference, with the reason: the first that suits machine and model is chosen.
PREFERENCE: dict[str, tuple[Suits, str]] = {
    "tensorrt": (
        lambda machine, facts: has(machine, SPARSE_CORES),
        "TensorRT runs int8 in tensor cores, and skips the zeros of 2:4.",
    ),
    "cpu-sparse": (
        lambda machine, facts: (
            not has(machine, FP16_CORES) and machine.processor.is_x86 and bool(machine.kernels.instruction_set)
        ),
        "sqat's own CPU kernels skip the zeros of 2:4 and run attention in int8.",
    ),
    "torch-semi-structured": (
        lambda machine, facts: (
            facts.is_sparse
            and not facts.quantized
            and has(machine, SPARSE_CORES)
            and machine.cusparselt
            and not machine.has_tensorrt
        ),
        "torch runs 2:4 in sparse fp16 tensor cores, through cuSPARSELt.",
    ),
    "onnx-int8": (
        lambda machine, facts: has(machine, INT8_CORES) or not has(machine, FP16_CORES),
        "Int8 kernels are the fastest for this model on this machine.",
    ),
    "onnx-fp16": (
        lambda machine, facts: has(machine, FP16_CORES),
        "TensorRT and ONNX Runtime run fp16 in tensor cores; TensorRT skips the zeros of 2:4 from 8.0 on.",
    ),
    "onnx-fp32": (lambda machine, facts: True, "ONNX Runtime runs it on any CPU."),
}
USES = {"compressed-tensors": "is for tools that load transformers folders; transformers computes it in float"}
