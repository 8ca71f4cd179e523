"""The table of families: its registry, what is expected, and the page made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from scripts.docs import families as page
from scripts.families.expected import REFUSALS, expected_refusal
from scripts.families.registry import FAMILIES
from scripts.families.trial import Outcome, Record, fits, short
from scripts.families.verdicts import failures
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.targets import TARGETS


def test_there_are_enough_families_and_transformers_knows_each() -> None:
    kinds = {"text": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
    kinds["image"] = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    for kind, least in (("text", 40), ("image", 15)):
        names = {family.model_type for family in FAMILIES.values() if family.kind == kind}
        assert len(names) >= least
        assert names <= set(kinds[kind])


def test_every_target_goes_with_a_placement() -> None:
    assert all(any(fits(target, placement) for placement in PLACEMENTS) for target in TARGETS)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.reason[:30])
def test_every_expected_refusal_is_of_some_family(refusal: Any) -> None:
    placements = ("qat", *PLACEMENTS)
    parts = ("distillation", *TARGETS)
    cases = [(name, placement, part) for name in FAMILIES for placement in placements for part in parts]
    assert any(expected_refusal(*case) is refusal for case in cases)


def record(name: str, placement: str, target: str, **outcome: str) -> dict[str, Any]:
    """The record of a family of which one target was tried, at a commit."""
    found = Record(name, FAMILIES[name].model_type, FAMILIES[name].kind, layers=3)
    found.placements[placement] = {"float": {"outside": 1}, "notes": [], "targets": {target: short(Outcome(**outcome))}}
    return {**asdict(found), "commit": "0123"}


REFUSED = {"end": "refused", "code": "unsupported-model", "message": "no"}


@pytest.mark.parametrize(
    ("case", "failing"),
    [
        ({"name": "bert", "placement": "cpu", "target": "cpu-sparse", "end": "works"}, False),
        ({"name": "bert", "placement": "cpu", "target": "cpu-sparse", **REFUSED}, True),
        ({"name": "mpnet", "placement": "cpu", "target": "cpu-sparse", **REFUSED}, False),
        ({"name": "mpnet", "placement": "cpu", "target": "cpu-sparse", **REFUSED, "code": "parity"}, True),
        ({"name": "mpnet", "placement": "cpu", "target": "cpu-sparse", **REFUSED, "end": "late"}, True),
        ({"name": "mpnet", "placement": "cpu", "target": "cpu-sparse", "end": "works"}, True),
        ({"name": "bert", "placement": "linear", "target": "onnx-int8", "end": "fault", "code": "KeyError"}, True),
    ],
)
def test_only_an_expected_refusal_before_the_first_step_is_no_failure(case: dict[str, str], failing: bool) -> None:
    assert bool(failures(record(**case))) is failing


def test_the_page_tells_what_works_what_is_refused_and_what_fails() -> None:
    entries = [
        record("bert", "linear", "onnx-int8", end="works"),
        record("mpnet", "cpu", "cpu-sparse", **REFUSED),
        record("xlnet", "linear", "onnx-fp32", end="fault", code="KeyError", message="'q'", stage="export"),
    ]
    text = page.page({"transformers": "5", "families": entries})
    assert "| bert | works |" in text
    assert "refused (1)" in text
    refusal = expected_refusal("mpnet", "cpu", "cpu-sparse")
    assert refusal
    assert f"1. {refusal.reason}" in text
    assert "| xlnet | **fault** |" in text
    assert "fault in export: KeyError: 'q'" in text


def test_the_page_is_made_of_the_measured_table() -> None:
    report = json.loads(page.RECORDS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(report)
    kinds = [entry["kind"] for entry in report["families"]]
    assert kinds.count("text") >= 40
    assert kinds.count("image") >= 15
