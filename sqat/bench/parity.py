"""The difference of two artifacts' outputs: the largest difference, and how many decisions differ.

A decision is the argmax of a classifier's scores. Other outputs have no decisions. Nothing is judged here: the parity
gate of the export stage does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sqat.checkpoint.manifest import Figure

Array = NDArray[Any]


class Parity(BaseModel):
    """One artifact's output compared with the baseline's on the same inputs.

    Attributes:
        largest: absolute difference; infinite if an output holds NaN.
        scale: largest absolute value of the baseline.
        rows: number of compared rows.
        differing: rows whose decision differs; None if the model is no classifier.
        problem: why the outputs cannot be compared; empty if they can.
    """

    model_config = ConfigDict(extra="forbid")

    largest: Figure = 0.0
    scale: Figure = 0.0
    rows: int = 0
    differing: int | None = None
    problem: str = ""


def compare(baseline: Array, output: Array, decides: bool) -> Parity:
    """Compare two outputs [B, ...].

    Args:
        decides: whether the model is a classifier.
    """
    if baseline.shape != output.shape:
        return Parity(problem=f"output {list(output.shape)} against {list(baseline.shape)}")
    one, other = baseline.astype(np.float64), output.astype(np.float64)
    largest = float(np.nan_to_num(np.abs(one - other), nan=np.inf).max(initial=0.0))
    choice = decides and one.ndim == 2 and one.shape[1] > 1
    differing = int((one.argmax(axis=1) != other.argmax(axis=1)).sum()) if choice else None
    return Parity(largest=largest, scale=float(np.abs(one).max(initial=0.0)), rows=len(one), differing=differing)


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether a model is a classifier, by its architecture and problem type."""
    names = [str(name) for name in config.get("architectures") or ()]
    return any("Classification" in name for name in names) and config.get("problem_type") != "regression"
