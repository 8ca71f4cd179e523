"""A third of the measured families through the stages, each with one placement and one target.

Each kind of model is met, each placement and each target. A script measures the whole table, `recipes/FAMILIES.md`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts.docs.families import RECORDS
from scripts.families.registry import FAMILIES
from scripts.families.trial import fits, try_family
from scripts.families.verdicts import failures
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.targets import TARGETS

pytestmark = pytest.mark.pipeline
PACKED, FOLDER = "torch-semi-structured", "compressed-tensors"  # these need no ONNX graph, which takes seconds
CASES = (
    ("albert", "tensorrt", "tensorrt"),
    ("bart", "linear", PACKED),
    ("bloom", "tensorrt", FOLDER),
    ("clip", "tensorrt", FOLDER),
    ("convbert", "linear", PACKED),
    ("convnext", "linear", "onnx-int8"),
    ("cvt", "tensorrt", FOLDER),
    ("deberta-v3", "tensorrt", FOLDER),
    ("electra", "cpu", "cpu-sparse"),
    ("fnet", "linear", PACKED),
    ("funnel", "tensorrt", FOLDER),
    ("gemma2", "tensorrt-full", FOLDER),
    ("gpt2", "linear", FOLDER),
    ("gpt_oss", "tensorrt", FOLDER),
    ("longformer", "linear", PACKED),
    ("luke", "linear", FOLDER),
    ("mobilebert", "linear", PACKED),
    ("modernbert", "tensorrt-full", FOLDER),
    ("mpnet", "cpu", "cpu-sparse"),
    ("perceiver", "linear", PACKED),
    ("poolformer", "linear", "onnx-fp32"),
    ("roformer", "tensorrt-full", FOLDER),
    ("swin", "tensorrt", FOLDER),
    ("t5", "linear", FOLDER),
    ("vit", "linear", "onnx-fp16"),
    ("xlnet", "linear", PACKED),
    ("xmod", "linear", FOLDER),
)


@pytest.mark.parametrize(("name", "placement", "target"), CASES)
def test_a_family_goes_through_the_stages(name: str, placement: str, target: str, tmp_path: Path) -> None:
    assert failures(asdict(try_family(name, tmp_path, (placement,), (target,)))) == []


def test_a_third_of_the_families_meets_each_kind_placement_and_target() -> None:
    names, placements, targets = (set(column) for column in zip(*CASES, strict=True))
    measured = json.loads(RECORDS.read_text(encoding="utf-8"))["families"]
    assert len(names) == len(CASES) >= len(measured) / 3
    assert placements == set(PLACEMENTS)
    assert targets == set(TARGETS)
    assert all(fits(target, placement) for _, placement, target in CASES)
    traits = {trait for family in FAMILIES.values() for trait in family.traits}
    assert traits == {trait for name in names for trait in FAMILIES[name].traits}
