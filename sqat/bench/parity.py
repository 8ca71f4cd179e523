"""Whether two artifacts compute the same: the largest difference of their outputs, and how many decisions differ.

A decision is the largest of a classifier's scores. Embeddings, single scores and pictures have none: of them the
difference is told beside the size of the values. Left out: a verdict; how much int8 may move is the export's gate.
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
    """One artifact's output beside the baseline's on the same inputs.

    Attributes:
        largest: absolute difference; infinite where either holds what is no number.
        scale: largest absolute value of the baseline.
        rows: that were compared.
        differing: rows whose decision differs, None where the output is no choice among classes.
        problem: why nothing could be compared, empty where it could.
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
        decides: whether the model chooses among classes.
    """
    if baseline.shape != output.shape:
        return Parity(problem=f"output {list(output.shape)} against {list(baseline.shape)}")
    one, other = baseline.astype(np.float64), output.astype(np.float64)
    largest = float(np.nan_to_num(np.abs(one - other), nan=np.inf).max(initial=0.0))
    choice = decides and one.ndim == 2 and one.shape[1] > 1
    differing = int((one.argmax(axis=1) != other.argmax(axis=1)).sum()) if choice else None
    return Parity(largest=largest, scale=float(np.abs(one).max(initial=0.0)), rows=len(one), differing=differing)


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a model chooses among classes, by the name of its architecture and what its head is for."""
    names = [str(name) for name in config.get("architectures") or ()]
    return any("Classification" in name for name in names) and config.get("problem_type") != "regression"
