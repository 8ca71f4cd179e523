"""How far a score may move before a decision counts as another one, when two forms of one model are compared."""

from __future__ import annotations

from torch import Tensor

SHARE = 0.01


def slack(wanted: Tensor) -> float:
    """A hundredth of the spread (standard deviation) of the reference's scores.

    Two options nearer than this are a tie to the reference itself: which of them wins is rounding, not meaning.
    """
    return SHARE * float(wanted.double().std(unbiased=False))
