"""A table of machines and models, each with the target that suits it and what must be said about it."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sqat.checkpoint.manifest import LayerRecord, Manifest
from sqat.cli.tables.layout import print_paragraph
from sqat.hardware.auto_target import PREFERENCE, USES, Facts, choose_target, explain, facts_of
from sqat.hardware.machine import Gpu, Kernels, Machine, Processor
from sqat.recipe.targets import TARGETS

VNNI = Processor("AMD EPYC 9654", "x86_64", 8, frozenset({"avx2", "avx512_vnni"}))
AVX2 = Processor("AMD EPYC 7763", "x86_64", 2, frozenset({"avx2"}))
ARM = Processor("", "aarch64", 4, frozenset({"dotprod"}))
ARM_OLD = Processor("", "aarch64", 4)
AVX2_KERNELS = Kernels("avx2", problem="")
P4, V100, T4 = Gpu("Tesla P4", (6, 1)), Gpu("Tesla V100", (7, 0)), Gpu("Tesla T4", (7, 5))
A10, B200 = Gpu("NVIDIA A10", (8, 6)), Gpu("NVIDIA B200", (10, 0))
TORCH = {"torch": "2.13.0", "onnxruntime": "1.32.0"}
TRT, TRT8, RTX = {"tensorrt": "10.13.0"}, {"tensorrt": "8.6.1"}, {"tensorrt_rtx": "1.7.1"}
SPARSE8 = Facts("2:4", quantized=True, placement="tensorrt")
LINEAR8 = Facts("2:4", quantized=True, placement="linear")
CPU8 = Facts("2:4", quantized=True, placement="cpu")
DENSE8 = Facts("", quantized=True, placement="tensorrt")
DENSE_CPU8 = Facts("", quantized=True, placement="cpu")
SPARSE, DENSE, WIDE = Facts("2:4"), Facts(), Facts("4:8", quantized=True, placement="tensorrt")

CASES: list[tuple[Machine, Facts, str, tuple[str, ...]]] = [
    (Machine(VNNI, (A10,), TRT), SPARSE8, "tensorrt", ("skips the zeros of 2:4",
                                                       "TensorRT 10.13.0 is installed: `sqat engine`")),
    (Machine(VNNI, (A10,), TORCH), SPARSE8, "tensorrt", ("not installed: pip install tensorrt, then `sqat engine`",)),
    (Machine(VNNI, (A10,), RTX), SPARSE8, "tensorrt", ("TensorRT-RTX 1.7.1 is installed",)),
    (Machine(VNNI, (A10,), {}, trtexec=True), SPARSE8, "tensorrt", ("trtexec is installed", "sqat engine --log")),
    (Machine(VNNI, (A10,), {"tensorrt": "8.6.1"}), Facts("2:4"), "onnx-fp16", ("reads no file of opset 20",)),
    (Machine(VNNI, (A10,), TRT8), SPARSE8, "tensorrt", ("TensorRT 8.6.1 runs only convolutions sparse",
                                                        "layers to conv1x1 and weights to qdq")),
    (Machine(VNNI, (A10,), TRT), LINEAR8, "onnx-int8", ("set the calibrate stage's placement to tensorrt",)),
    (Machine(VNNI, (A10,), TRT), DENSE8, "tensorrt", ("int8 in tensor cores",)),
    (Machine(VNNI, (A10,), TRT), WIDE, "tensorrt", ("pruned 4:8 runs as a dense one", "int8 in tensor cores")),
    (Machine(VNNI, (T4, B200), TRT), SPARSE8, "tensorrt", ("int8 in tensor cores",)),
    (Machine(VNNI, (A10,), TRT), SPARSE, "onnx-fp16", ("fp16 in tensor cores", "TensorRT 10.13.0 is installed")),
    (Machine(VNNI, (A10,), TRT, cusparselt=True), SPARSE, "onnx-fp16", ("fp16 in tensor cores",)),
    (Machine(VNNI, (A10,), TORCH, cusparselt=True), SPARSE, "torch-semi-structured", ("cuSPARSELt",)),
    (Machine(VNNI, (A10,), TORCH), SPARSE, "onnx-fp16", ("pip install tensorrt",)),
    (Machine(VNNI, (A10,), TORCH, cusparselt=True), DENSE, "onnx-fp16", ("fp16 in tensor cores",)),
    (Machine(VNNI, (T4,), TRT), SPARSE8, "onnx-int8", ("no sparse tensor cores", "pruning brings no speed", "Int8")),
    (Machine(VNNI, (T4,), TRT), DENSE, "onnx-fp16", ("fp16 in tensor cores",)),
    (Machine(VNNI, (V100,), TRT), SPARSE8, "onnx-fp16", ("no sparse tensor cores", "fp16 in tensor cores")),
    (Machine(VNNI, (P4,), TRT), SPARSE8, "onnx-int8", ("P4 (compute capability 6.1) has no tensor", "avx512_vnni")),
    (Machine(VNNI), SPARSE8, "onnx-int8", ("exactly (avx512_vnni)", "pruning brings no speed")),
    (Machine(VNNI, (), {"openvino": "2026.4"}), DENSE8, "onnx-int8", ("exactly (avx512_vnni)",)),
    (Machine(AVX2, (), {"openvino": "2026.4"}), DENSE8, "onnx-int8", ("OpenVINO's int8 kernels saturate",)),
    (Machine(AVX2), SPARSE8, "onnx-int8", ("no VNNI", "saturates", "session.x64quantprecision")),
    (Machine(Processor("", "AMD64", 4)), SPARSE8, "onnx-int8", ("does not say whether the CPU has VNNI",)),
    (Machine(ARM), SPARSE8, "onnx-int8", ("(dotprod)",)),
    (Machine(ARM_OLD), DENSE8, "onnx-int8", ("Int8 kernels",)),
    (Machine(AVX2, kernels=AVX2_KERNELS), CPU8, "cpu-sparse", ("sqat's own CPU kernels skip the zeros",
                                                        "in ONNX Runtime with sqat.runtime")),
    (Machine(VNNI, kernels=AVX2_KERNELS), DENSE_CPU8, "cpu-sparse", ("run attention in int8",)),
    (Machine(VNNI, (P4,), TRT, kernels=AVX2_KERNELS), CPU8, "cpu-sparse", ("6.1) has no tensor cores",)),
    (Machine(AVX2), CPU8, "onnx-int8", ("Int8 kernels",)),
    (Machine(ARM, kernels=AVX2_KERNELS), CPU8, "onnx-int8", ("Int8 kernels",)),
    (Machine(VNNI, (A10,), TRT), CPU8, "onnx-int8", ("set the calibrate stage's placement to tensorrt",)),
    (Machine(AVX2), LINEAR8, "onnx-int8", ("calibrate a BERT-type encoder with placement cpu for cpu-sparse",)),
    (Machine(AVX2), SPARSE, "onnx-fp32", ("not quantized", "pruning brings no speed", "calibrate stage")),
    (Machine(), DENSE, "onnx-fp32", ("not quantized",)),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "facts", "target", "said"), CASES)
def test_each_machine_gets_its_target_and_its_reasons(
    machine: Machine, facts: Facts, target: str, said: tuple[str, ...]
) -> None:
    choice = choose_target(machine, facts)
    assert choice.target == target
    text = " ".join(choice.reasons)
    assert [part for part in said if part not in text] == []


def test_advice_that_does_not_apply_is_absent() -> None:
    text = " ".join(choose_target(Machine(VNNI, (), TORCH), DENSE8).reasons)
    assert not [word for word in ("saturate", "OpenVINO", "pruning") if word in text]
    assert "placement" not in " ".join(choose_target(Machine(VNNI, (A10,), TRT), SPARSE8).reasons)


def test_why_not_the_kernels_of_sqat() -> None:
    def why(machine: Machine, facts: Facts) -> str:
        return choose_target(machine, facts).others["cpu-sparse"]

    assert why(Machine(AVX2), CPU8) == "needs compiled kernels (no compiled sqat.runtime)"
    assert why(Machine(ARM, kernels=Kernels("scalar")), CPU8).startswith("needs AVX2")
    assert why(Machine(AVX2), LINEAR8).startswith("needs activation placement cpu")
    assert "cpu-sparse" not in " ".join(choose_target(Machine(AVX2), CPU8).reasons), "it is calibrated for it already"


MACHINES = st.builds(
    Machine,
    processor=st.sampled_from([VNNI, AVX2, ARM, ARM_OLD, Processor()]),
    gpus=st.lists(st.builds(Gpu, st.just("GPU"), st.tuples(st.integers(3, 12), st.integers(0, 9)))).map(tuple),
    versions=st.sampled_from([{}, TORCH, TRT, TRT8, RTX, {"tensorrt": ""}]),
    trtexec=st.booleans(),
    cusparselt=st.booleans(),
    kernels=st.sampled_from([Kernels(), AVX2_KERNELS]),
    unknown=st.sampled_from([(), ("torch: ImportError " + "long " * 40,)]),
)
FACTS = st.builds(
    Facts, st.sampled_from(["", "1:4", "2:4", "4:8"]), st.booleans(), st.sampled_from(["", "linear", "cpu"])
)


@given(MACHINES, FACTS)
def test_every_machine_gets_a_target_it_can_have_in_80_columns(machine: Machine, facts: Facts) -> None:
    choice = choose_target(machine, facts)
    assert {choice.target, *choice.others} == set(TARGETS)
    assert choice.target not in choice.others
    assert choice.reasons
    assert facts.quantized or choice.target in ("onnx-fp16", "onnx-fp32", "torch-semi-structured")
    capability = max((gpu.capability for gpu in machine.gpus), default=(0, 0))
    assert capability >= (8, 0) or choice.target not in ("tensorrt", "torch-semi-structured")
    assert machine.kernels.instruction_set or choice.target != "cpu-sparse"
    paragraphs = list(explain(machine, facts, choice))
    assert ("target", choice.target) in paragraphs
    console = Console(file=io.StringIO(), width=80)
    for label, text in paragraphs:
        print_paragraph(console, label, text)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]


def test_every_target_can_be_chosen_or_has_its_use() -> None:
    assert {*PREFERENCE, *USES} == set(TARGETS)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "3:8", "4:8", "1:6", "2:6", "1:3"])
def test_a_pattern_is_sparse_for_tensor_cores_if_every_mask_of_it_is_2_of_4(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    masks = list(itertools.combinations(range(m), n))
    stretches = itertools.product(masks, repeat=math.lcm(m, 4) // m)
    worst = max(
        max(Counter((group * m + kept) // 4 for group, mask in enumerate(stretch) for kept in mask).values())
        for stretch in stretches
    )
    assert Facts(pattern).is_sparse == (worst <= 2)


def test_facts_of_a_manifest() -> None:
    layers = {"a": LayerRecord(pattern="2:4", quantized=True), "b": LayerRecord(dense_because="excluded")}
    manifest = Manifest(
        stage="qat", type="qat", fingerprint="k", base_model="m", seed=0, layers=layers, placement="linear"
    )
    assert facts_of(manifest) == LINEAR8
    assert facts_of(manifest.model_copy(update={"layers": {"b": LayerRecord()}, "placement": ""})) == DENSE
