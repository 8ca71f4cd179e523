"""A table of machines and models, each with the target that suits it and what must be said about it."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.checkpoint.manifest import LayerRecord, Manifest
from sqat.hardware.choosing import OTHERWISE, Facts, choose_target, explain, facts_of
from sqat.hardware.machine import Gpu, Machine, Processor

VNNI = Processor("AMD EPYC 9654", "x86_64", 8, frozenset({"avx2", "avx512_vnni"}))
AVX2 = Processor("AMD EPYC 7763", "x86_64", 2, frozenset({"avx2"}))
ARM = Processor("", "aarch64", 4, frozenset({"dotprod"}))
ARM_OLD = Processor("", "aarch64", 4)
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
    (Machine(VNNI, (A10,), TRT), SPARSE8, "tensorrt", ("A10 (compute capability 8.6) has sparse int8 tensor cores",
                                                       "TensorRT 10.13.0 is installed: `sqat engine`")),
    (Machine(VNNI, (A10,), TORCH), SPARSE8, "tensorrt", ("not installed: pip install tensorrt, then `sqat engine`",)),
    (Machine(VNNI, (A10,), RTX), SPARSE8, "tensorrt", ("TensorRT-RTX 1.7.1 is installed",)),
    (Machine(VNNI, (A10,), {}, trtexec=True), SPARSE8, "tensorrt", ("trtexec is here", "sqat engine --log")),
    (Machine(VNNI, (A10,), {"tensorrt": "8.6.1"}), Facts("2:4"), "onnx-fp16", ("reads no file of opset 20",)),
    (Machine(VNNI, (A10,), TRT8), SPARSE8, "tensorrt", ("TensorRT 8.6.1 runs sparse math in convolutions only",
                                                        "layers to conv1x1 and weights to qdq")),
    (Machine(VNNI, (A10,), TRT), LINEAR8, "onnx-int8", ("set stages.calibrate.placement to tensorrt",)),
    (Machine(VNNI, (A10,), TRT), DENSE8, "tensorrt", ("has int8 tensor cores",)),
    (Machine(VNNI, (A10,), TRT), WIDE, "tensorrt", ("pruned 4:8 runs as if dense", "has int8 tensor cores")),
    (Machine(VNNI, (T4, B200), TRT), SPARSE8, "tensorrt", ("B200 (compute capability 10.0)",)),
    (Machine(VNNI, (A10,), TRT), SPARSE, "onnx-fp16", ("sparse fp16 tensor cores", "TensorRT 10.13.0 is installed")),
    (Machine(VNNI, (A10,), TRT, cusparselt=True), SPARSE, "onnx-fp16", ("sparse fp16",)),
    (Machine(VNNI, (A10,), TORCH, cusparselt=True), SPARSE, "torch-semi-structured", ("cuSPARSELt",)),
    (Machine(VNNI, (A10,), TORCH), SPARSE, "onnx-fp16", ("pip install tensorrt",)),
    (Machine(VNNI, (A10,), TORCH, cusparselt=True), DENSE, "onnx-fp16", ("has fp16 tensor cores",)),
    (Machine(VNNI, (T4,), TRT), SPARSE8, "onnx-int8", ("no sparse tensor cores", "pruning brings no speed", "int8")),
    (Machine(VNNI, (T4,), TRT), DENSE, "onnx-fp16", ("Dense fp16",)),
    (Machine(VNNI, (V100,), TRT), SPARSE8, "onnx-fp16", ("no sparse tensor cores", "no int8 tensor cores")),
    (Machine(VNNI, (P4,), TRT), SPARSE8, "onnx-int8", ("P4 (compute capability 6.1) has no tensor", "avx512_vnni")),
    (Machine(VNNI), SPARSE8, "onnx-int8", ("exactly in one instruction (avx512_vnni)", "pruning brings no speed")),
    (Machine(VNNI, (), {"openvino": "2026.4"}), DENSE8, "onnx-int8", ("OpenVINO runs the same file",)),
    (Machine(AVX2, (), {"openvino": "2026.4"}), DENSE8, "onnx-int8", ("OpenVINO's int8 kernels saturate",)),
    (Machine(AVX2), SPARSE8, "onnx-int8", ("no VNNI", "saturates", "session.x64quantprecision")),
    (Machine(Processor("", "AMD64", 4)), SPARSE8, "onnx-int8", ("does not tell whether the CPU has VNNI",)),
    (Machine(ARM), SPARSE8, "onnx-int8", ("(dotprod)",)),
    (Machine(ARM_OLD), DENSE8, "onnx-int8", ("ONNX Runtime runs every quantized layer",)),
    (Machine(AVX2, kernels=True), CPU8, "cpu-sparse", ("sqat's own kernels, which skip the zeros",
                                                        "sqat.runtime registered")),
    (Machine(VNNI, kernels=True), DENSE_CPU8, "cpu-sparse", ("own kernels, which keep attention",)),
    (Machine(VNNI, (P4,), TRT, kernels=True), CPU8, "cpu-sparse", ("P4 (compute capability 6.1) has no tensor",)),
    (Machine(AVX2), CPU8, "onnx-int8", ("ONNX Runtime runs every quantized layer",)),
    (Machine(ARM, kernels=True), CPU8, "onnx-int8", ("ONNX Runtime runs every quantized layer",)),
    (Machine(VNNI, (A10,), TRT), CPU8, "onnx-int8", ("set stages.calibrate.placement to tensorrt",)),
    (Machine(AVX2), LINEAR8, "onnx-int8", ("target cpu-sparse, for BERT-type encoders calibrated with placement cpu",)),
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


def test_what_does_not_hold_is_not_said() -> None:
    text = " ".join(choose_target(Machine(VNNI, (), TORCH), DENSE8).reasons)
    assert not [word for word in ("saturate", "OpenVINO", "pruning") if word in text]
    assert "placement" not in " ".join(choose_target(Machine(VNNI, (A10,), TRT), SPARSE8).reasons)


def test_why_not_the_kernels_of_sqat() -> None:
    def why(machine: Machine, facts: Facts) -> str:
        return choose_target(machine, facts).others["cpu-sparse"]

    assert why(Machine(AVX2), CPU8).startswith("its kernels are not compiled in this installation; sqat.runtime.")
    assert why(Machine(ARM), CPU8) == "its kernels are for x86 CPUs."
    assert why(Machine(AVX2), LINEAR8) == "for x86 CPUs; needs a BERT-type encoder calibrated with placement cpu."
    assert "cpu-sparse" not in " ".join(choose_target(Machine(AVX2), CPU8).reasons), "it is calibrated for it already"


MACHINES = st.builds(
    Machine,
    processor=st.sampled_from([VNNI, AVX2, ARM, ARM_OLD, Processor()]),
    gpus=st.lists(st.builds(Gpu, st.just("GPU"), st.tuples(st.integers(3, 12), st.integers(0, 9)))).map(tuple),
    versions=st.sampled_from([{}, TORCH, TRT, TRT8, RTX, {"tensorrt": ""}]),
    trtexec=st.booleans(),
    cusparselt=st.booleans(),
    kernels=st.booleans(),
    unknown=st.sampled_from([(), ("torch: ImportError " + "long " * 40,)]),
)
FACTS = st.builds(
    Facts, st.sampled_from(["", "1:4", "2:4", "4:8"]), st.booleans(), st.sampled_from(["", "linear", "cpu"])
)


@given(MACHINES, FACTS)
def test_every_machine_gets_a_target_it_can_have_in_80_columns(machine: Machine, facts: Facts) -> None:
    choice = choose_target(machine, facts)
    assert {choice.target, *choice.others} == set(OTHERWISE)
    assert choice.target not in choice.others
    assert choice.reasons
    assert facts.quantized or choice.target in ("onnx-fp16", "onnx-fp32", "torch-semi-structured")
    capability = max((gpu.capability for gpu in machine.gpus), default=(0, 0))
    assert capability >= (8, 0) or choice.target not in ("tensorrt", "torch-semi-structured")
    assert machine.kernels or choice.target != "cpu-sparse"
    lines = explain(machine, facts, choice)
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.split() == ["target", choice.target]]


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "3:8", "4:8", "1:6", "2:6", "1:3"])
def test_a_pattern_is_sparse_for_tensor_cores_if_every_mask_of_it_is_2_of_4(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    masks = list(itertools.combinations(range(m), n))
    stretches = itertools.product(masks, repeat=math.lcm(m, 4) // m)
    worst = max(
        max(Counter((group * m + kept) // 4 for group, mask in enumerate(stretch) for kept in mask).values())
        for stretch in stretches
    )
    assert Facts(pattern).sparse == (worst <= 2)


def test_a_pattern_is_halved_if_it_leaves_at_most_4_of_each_8() -> None:
    halved = [pattern for pattern in ("1:2", "1:4", "2:4", "3:4", "1:8", "4:8", "5:8", "8:16", "1:3", "")
              if Facts(pattern).halved]  # fmt: skip
    assert halved == ["1:2", "1:4", "2:4", "1:8", "4:8"], "8:16 may leave 8 of 8"


def test_facts_of_a_manifest() -> None:
    layers = {"a": LayerRecord(pattern="2:4", quantized=True), "b": LayerRecord(dense_because="excluded")}
    manifest = Manifest(stage="qat", type="qat", key="k", base_model="m", seed=0, layers=layers, placement="linear")
    assert facts_of(manifest) == LINEAR8
    assert facts_of(manifest.model_copy(update={"layers": {"b": LayerRecord()}, "placement": ""})) == DENSE
