"""Which export target fits a machine and a model, and why: the words behind `sqat export --target auto`.

What: `choose_target` is a pure function over a `Machine` and the `Facts` of a checkpoint; `explain` puts machine,
choice and reasons into lines of 80 columns.

Why by rule: what has kernels for a 2:4 int8 model is known from the compute capability and the instruction set;
what is fastest among them only `sqat bench` can say, on the machine itself. Left out: timing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqat.hardware.machine import Gpu, Machine, Processor

if TYPE_CHECKING:
    from sqat.checkpoint.manifest import Manifest

SPARSE = (8, 0)  # compute capability of the first sparse tensor cores (Ampere)
INT8 = (7, 2)  # of the first int8 tensor cores
FP16 = (7, 0)  # of the first fp16 tensor cores
COLUMNS = 80
INSTALL_TENSORRT = "pip install tensorrt"


@dataclass(frozen=True)
class Facts:
    """What matters of a checkpoint.

    Attributes:
        pattern: N:M of its pruned layers, empty for a dense model.
        quantized: whether layers are int8.
        placement: of the activation sites: ``linear``, ``tensorrt``, ``tensorrt-full`` or ``cpu``.
    """

    pattern: str = ""
    quantized: bool = False
    placement: str = ""

    @property
    def sparse(self) -> bool:
        """Whether the pattern is 2:4 or more zeros, the only one that tensor cores have a format for."""
        n, _, m = self.pattern.partition(":")
        return n == "1" or (n == "2" and int(m) % 4 == 0)

    @property
    def halved(self) -> bool:
        """Whether the pattern leaves at most 4 of each 8 weights, as the kernels of target cpu-sparse want it."""
        n, _, m = self.pattern.partition(":")
        return bool(n) and 8 % int(m) == 0 and 2 * int(n) <= int(m)

    @property
    def float_outputs(self) -> bool:
        """Whether the linears' outputs have no scales, which TensorRT's sparse kernels need."""
        return self.placement in ("linear", "cpu")


@dataclass(frozen=True)
class Choice:
    """A target, why it, and why not the others (target -> reason); each reason one sentence."""

    target: str
    reasons: tuple[str, ...]
    others: Mapping[str, str]


def facts_of(manifest: Manifest) -> Facts:
    """Read the facts off a checkpoint's manifest."""
    patterns = {record.pattern for record in manifest.layers.values() if record.pattern}
    return Facts(
        pattern=max(patterns, default=""),
        quantized=any(record.quantized for record in manifest.layers.values()),
        placement=manifest.placement,
    )


def choose_target(machine: Machine, facts: Facts) -> Choice:
    """Choose the export target that this machine has the best kernels for.

    Args:
        machine: where the exported model will run.
        facts: of the checkpoint.
    """
    gpu = machine.gpu
    if gpu is not None and gpu.capability >= SPARSE:
        target, reasons = choose_for_sparse_gpu(machine, gpu, facts)
    elif gpu is not None and gpu.capability >= FP16:
        target, reasons = choose_for_dense_gpu(gpu, facts)
    else:
        target, reasons = choose_for_processor(machine, facts)
        if gpu is not None:
            reasons.insert(0, f"{title(gpu)} has no tensor cores, so the processor is looked at instead.")
    others = {name: why(machine, facts) for name, why in OTHERWISE.items() if name != target}
    return Choice(target, tuple(reasons), others)


def choose_for_sparse_gpu(machine: Machine, gpu: Gpu, facts: Facts) -> tuple[str, list[str]]:
    """Ampere and later: 2:4 in int8 by TensorRT, in fp16 by TensorRT or torch."""
    reasons = []
    if facts.pattern and not facts.sparse:
        reasons.append(f"Tensor cores take 2:4 and nothing else: a model pruned {facts.pattern} runs as if dense.")
    if facts.quantized:
        kernels = "sparse int8" if facts.sparse else "int8"
        reasons.append(f"{title(gpu)} has {kernels} tensor cores, and TensorRT uses them.")
        if facts.float_outputs:
            reasons.append("Its sparse kernels write int8 too, and this checkpoint has no scales for the linears' "
                           "outputs: set stages.calibrate.placement to tensorrt to get target tensorrt.")  # fmt: skip
            return "onnx-int8", [*reasons, *tensorrt_reasons(machine, "onnx-int8")]
        return "tensorrt", [*reasons, *tensorrt_reasons(machine, "tensorrt")]
    if facts.sparse and not machine.has_tensorrt and machine.cusparselt:
        return "torch-semi-structured", [
            f"{title(gpu)} has sparse fp16 tensor cores, and torch here has cuSPARSELt to use them.",
            f"With TensorRT ({INSTALL_TENSORRT}) target onnx-fp16 would be the better one.",
        ]
    kernels = "sparse fp16" if facts.sparse else "fp16"
    reasons.append(f"{title(gpu)} has {kernels} tensor cores, and TensorRT uses them.")
    return "onnx-fp16", [*reasons, *tensorrt_reasons(machine, "onnx-fp16")]


def tensorrt_reasons(machine: Machine, target: str) -> list[str]:
    """What TensorRT there is for a target, or how to get it."""
    version = machine.versions.get("tensorrt", "")
    if version.startswith("8.") and target != "tensorrt":
        return [f"TensorRT {version} reads no file of opset 20, as this one is: upgrade to TensorRT 10."]
    if version.startswith("8."):
        return [f"TensorRT {version} runs sparse math in convolutions only: set stages.export.tensorrt.layers to "
                "conv1x1 and weights to qdq."]  # fmt: skip
    if "tensorrt" in machine.versions:
        return [f"TensorRT {version}".strip() + " is installed: `sqat engine` builds the engine."]
    if machine.trtexec:
        return ["trtexec is here: it builds the engine, and `sqat engine --log` reads what it wrote."]
    if "tensorrt_rtx" in machine.versions:
        found = f"TensorRT-RTX {machine.versions['tensorrt_rtx']}".strip()
        return [f"{found} is installed: `sqat engine` builds the engine with it."]
    return [f"TensorRT is not installed: {INSTALL_TENSORRT}, then `sqat engine`."]


def choose_for_dense_gpu(gpu: Gpu, facts: Facts) -> tuple[str, list[str]]:
    """Volta and Turing: tensor cores without sparsity."""
    reasons = []
    if facts.pattern:
        reasons.append(f"{title(gpu)} has no sparse tensor cores (8.0 is the first), so pruning brings no speed there.")
    if facts.quantized and gpu.capability >= INT8:
        return "onnx-int8", [*reasons, "Dense int8 kernels are its fastest, through TensorRT."]
    if facts.quantized:
        reasons.append(f"{title(gpu)} has no int8 tensor cores: the file holds the weights without quantization.")
    return "onnx-fp16", [*reasons, "Dense fp16 kernels are its fastest, through TensorRT or ONNX Runtime."]


def choose_for_processor(machine: Machine, facts: Facts) -> tuple[str, list[str]]:
    """CPU only: int8 where the model is quantized."""
    if facts.quantized and facts.placement == "cpu" and machine.processor.is_x86 and machine.kernels:
        return "cpu-sparse", kernel_reasons(facts)
    reasons = [] if facts.quantized else ["The model is not quantized, and CPUs compute in fp32."]
    if facts.pattern:
        reasons.append("ONNX Runtime and OpenVINO multiply zeros like other numbers: on a CPU pruning brings no speed.")
        if facts.quantized and facts.placement != "cpu" and machine.processor.is_x86:
            reasons.append("sqat's own kernels skip them: target cpu-sparse, for BERT-type encoders calibrated with "
                           "placement cpu.")  # fmt: skip
    if not facts.quantized:
        return "onnx-fp32", [*reasons, "A calibrate stage would make onnx-int8 possible: a smaller file, more speed."]
    reasons.insert(0, "ONNX Runtime runs every quantized layer in int8 on the CPU.")
    return "onnx-int8", [*reasons, *int8_reasons(machine)]


def kernel_reasons(facts: Facts) -> list[str]:
    """Why the kernels of sqat itself."""
    skipped = "skip the zeros and " if facts.halved else ""
    return [f"The checkpoint was calibrated for sqat's own kernels, which {skipped}keep attention in int8.",
            "ONNX Runtime runs the file with sqat.runtime registered; any other runtime needs onnx-int8."]  # fmt: skip


def int8_reasons(machine: Machine) -> list[str]:
    """How well a CPU multiplies int8, and whom it makes wrong."""
    processor, has_openvino = machine.processor, "openvino" in machine.versions
    if processor.has_int8_dot:
        exact = f"This CPU sums int8 products exactly in one instruction ({dot_names(processor)})."
        return [exact, *(["OpenVINO runs the same file in int8 too."] if has_openvino and processor.is_x86 else [])]
    if not processor.is_x86:
        return []
    lacking = "This CPU has no VNNI" if processor.features else "This system does not tell whether the CPU has VNNI"
    reasons = [
        f"{lacking}: without it int8 is little faster than fp32 (1.2 times, where it was measured).",
        "Without VNNI ONNX Runtime's default int8 kernel saturates: sqat sets the session option "
        "session.x64quantprecision to 1, and so must whoever serves the file.",
    ]
    warning = "OpenVINO's int8 kernels saturate too and have no such option: its logits are wrong on such a CPU."
    return [*reasons, *([warning] if has_openvino else [])]


def dot_names(processor: Processor) -> str:
    """Names of the int8 instructions a CPU has."""
    return ", ".join(name for name in ("amx_int8", "avx512_vnni", "avx_vnni", "dotprod") if name in processor.features)


def title(gpu: Gpu) -> str:
    """``NVIDIA A10 (compute capability 8.6)``."""
    return f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})"


def not_int8(machine: Machine, facts: Facts) -> str:
    if not facts.quantized:
        return "the model is not quantized."
    if facts.placement == "cpu":
        return "multiplies the zeros too, and attention in float."
    if machine.gpu is not None and machine.gpu.capability >= SPARSE:
        return "for CPUs; target tensorrt is the same model shaped for TensorRT's fusions."
    return "the GPU has no int8 tensor cores."


def not_fp32(machine: Machine, facts: Facts) -> str:
    return "four times the bytes of int8 and none of its kernels." if facts.quantized else "tensor cores take fp16."


def not_fp16(machine: Machine, facts: Facts) -> str:
    if machine.gpu is None or machine.gpu.capability < FP16:
        return "gains nothing on a CPU."
    return "twice the bytes of int8, at half the speed of its kernels." if facts.quantized else "needs TensorRT."


def not_tensorrt(machine: Machine, facts: Facts) -> str:
    if machine.gpu is None:
        return "needs an NVIDIA GPU of compute capability 8.0 or later, and there is none."
    if machine.gpu.capability < SPARSE:
        return "its sparse kernels need compute capability 8.0 or later."
    if facts.float_outputs:
        return "needs the scales of the linears' outputs: calibrate with placement tensorrt."
    return "needs int8 scales: put a calibrate stage before the export."


def not_cpu_sparse(machine: Machine, facts: Facts) -> str:
    if not facts.quantized or facts.placement != "cpu":
        return "for x86 CPUs; needs a BERT-type encoder calibrated with placement cpu."
    if machine.processor.is_x86 and not machine.kernels:
        return "its kernels are not compiled in this installation; sqat.runtime.library() says how to get them."
    return "its kernels are for x86 CPUs."


def not_semi_structured(machine: Machine, facts: Facts) -> str:
    if not facts.sparse:
        return "needs a model pruned 2:4."
    if machine.gpu is None or machine.gpu.capability < SPARSE:
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or later."
    if not machine.cusparselt:
        return "torch here has no cuSPARSELt."
    return "speeds up the linears alone; TensorRT also fuses what lies between them."


def not_compressed(machine: Machine, facts: Facts) -> str:
    if not facts.quantized:
        return "needs a quantized model."
    return "for tools that load transformers folders; transformers itself computes it in float."


def explain(machine: Machine, facts: Facts, choice: Choice) -> list[str]:
    """Machine, model, choice and reasons as lines of at most 80 columns."""
    processor = machine.processor
    features = ", ".join(sorted(processor.features)) or "no int8 or wide vector features known"
    cores = f"{processor.cores} core{'s' * (processor.cores > 1)}"
    packages = [f"{name} {version}".strip() for name, version in machine.versions.items()]
    providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in machine.providers)
    model = [f"pruned {facts.pattern}" if facts.pattern else "dense", "int8" if facts.quantized else "float"]
    model += [f"placement {facts.placement}"] if facts.placement else []
    paragraphs = [
        ("cpu", f"{processor.name or processor.machine or 'unknown'}, {cores}; {features}"),
        ("gpu", "; ".join(map(title, machine.gpus)) or "no NVIDIA GPU"),
        ("packages", ", ".join(packages) or "none of those that run exported models"),
        *([("providers", f"{providers} (ONNX Runtime)")] if providers else []),
        *(("not known", problem) for problem in machine.unknown),
        ("model", ", ".join(model)),
        ("target", choice.target),
        *(("", reason) for reason in choice.reasons),
        *(
            ("others" if number == 0 else "", f"{name}: {why}")
            for number, (name, why) in enumerate(choice.others.items())
        ),
    ]
    return [line for label, text in paragraphs for line in wrap(label, text)]


def wrap(label: str, text: str) -> list[str]:
    """A paragraph with a label in a column of its own."""
    return textwrap.wrap(text, COLUMNS, initial_indent=f"{label:<11}", subsequent_indent=" " * 11)


OTHERWISE: dict[str, Callable[[Machine, Facts], str]] = {
    "tensorrt": not_tensorrt,
    "cpu-sparse": not_cpu_sparse,
    "onnx-int8": not_int8,
    "onnx-fp16": not_fp16,
    "onnx-fp32": not_fp32,
    "torch-semi-structured": not_semi_structured,
    "compressed-tensors": not_compressed,
}
