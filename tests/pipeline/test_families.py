"""A third of the families through the stages, each with one placement and one target; the whole table is a script.

Each kind of model is met, each placement and each target. `recipes/FAMILIES.md` holds the whole table.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

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
    ("beit", "tensorrt-full", FOLDER),
    ("big_bird", "linear", PACKED),
    ("bloom", "tensorrt", FOLDER),
    ("clip", "tensorrt", FOLDER),
    ("convbert", "linear", PACKED),
    ("convnext", "linear", "onnx-int8"),
    ("cvt", "tensorrt", FOLDER),
    ("deberta", "linear", PACKED),
    ("deberta-v3", "tensorrt", FOLDER),
    ("electra", "cpu", "cpu-sparse"),
    ("flaubert", "linear", PACKED),
    ("fnet", "linear", PACKED),
    ("funnel", "tensorrt", FOLDER),
    ("gemma2", "tensorrt-full", FOLDER),
    ("gpt2", "linear", FOLDER),
    ("gpt_neo", "tensorrt", FOLDER),
    ("gpt_oss", "tensorrt", FOLDER),
    ("llama", "tensorrt-full", FOLDER),
    ("longformer", "linear", PACKED),
    ("luke", "linear", FOLDER),
    ("mobilenet_v1", "linear", PACKED),
    ("mobilevit", "tensorrt", FOLDER),
    ("mobilebert", "linear", PACKED),
    ("modernbert", "tensorrt-full", FOLDER),
    ("mpnet", "cpu", "cpu-sparse"),
    ("perceiver", "linear", PACKED),
    ("phi3", "tensorrt", FOLDER),
    ("poolformer", "linear", "onnx-fp32"),
    ("resnet", "tensorrt", FOLDER),
    ("roberta", "cpu", FOLDER),
    ("roformer", "tensorrt-full", FOLDER),
    ("squeezebert", "linear", PACKED),
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
    assert len(names) == len(CASES) >= len(FAMILIES) / 3
    assert placements == set(PLACEMENTS)
    assert targets == set(TARGETS)
    assert all(fits(target, placement) for _, placement, target in CASES)
    traits = {trait for family in FAMILIES.values() for trait in family.traits}
    assert traits == {trait for name in names for trait in FAMILIES[name].traits}
