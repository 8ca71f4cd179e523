"""`sqat inspect --fix`: repairs of a graph that keep the numbers, each with a note of what was done.

What keeps them: the same products of the same integers and scales in another place. What does not (a scale per
output channel where there was one, a new zero-point, a pair that was never calibrated) is left to the one who
quantizes, and so to the finding's advice. Repairs follow `REPAIRS` at the foot, those first that others build on.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import ModelProto

from sqat.lint.editing import Editing
from sqat.lint.findings import Change
from sqat.lint.inference import structure_error
from sqat.lint.pair_repairs import (
    add_zero_points_,
    center_zero_points_,
    drop_output_types_,
    fold_factors_,
    split_pairs_,
    split_zero_points_,
)
from sqat.lint.rules import RULES, TARGETS, Target
from sqat.lint.weight_repairs import (
    clear_negative_zeros_,
    copy_shared_weights_,
    drop_leftovers_,
    move_layout_,
    raise_dead_scales_,
)


def fix(model: ModelProto, target: Target) -> tuple[ModelProto, list[Change]]:
    """Repair what can be repaired without changing what a graph computes.

    Args:
        model: any graph, left as it is; with its external data loaded.
        target: rules that are not asked of it are not repaired either.

    Returns:
        The repaired graph and what was done, in order; a graph that ONNX's checker refuses comes back as it is.

    Raises:
        ValueError: a repair made a graph that the checker refuses, a fault of this module.
    """
    if structure_error(model):
        return model, []
    edit = Editing(model)
    for rule, repair in REPAIRS:
        if is_asked(rule, target):
            repair(edit)
            edit.commit()
    if fault := structure_error(edit.model):
        raise ValueError(f"the repaired graph is not sound: {fault}")
    return edit.model, edit.changes


def is_asked(rule: str, target: Target) -> bool:
    """Whether a rule holds for a target at all."""
    return any(entry.id == rule and entry.grades[TARGETS.index(target)] != "-" for entry in RULES)


REPAIRS: tuple[tuple[str, Callable[[Editing], None]], ...] = (
    ("B15", copy_shared_weights_),
    ("B5", move_layout_),
    ("B7", clear_negative_zeros_),
    ("B2", add_zero_points_),
    ("B2", center_zero_points_),
    ("B3", raise_dead_scales_),
    ("B1", drop_output_types_),
    ("B10", split_pairs_),
    ("B10", split_zero_points_),
    ("B12", fold_factors_),
    ("B15", drop_leftovers_),
)
REPAIRED = frozenset(rule for rule, _ in REPAIRS)
