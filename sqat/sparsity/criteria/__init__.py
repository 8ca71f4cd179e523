"""Which weights matter: one file a criterion, with its settings and its code.

A recipe, `sqat.api` and the reference page take their names from `CRITERIA`.
"""

from __future__ import annotations

from sqat.sparsity.criteria.criterion import Criterion as Criterion
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.criteria.sparsegpt import SparseGPT
from sqat.sparsity.criteria.taylor import Taylor
from sqat.sparsity.criteria.wanda import Wanda

CRITERIA: tuple[type[Criterion], ...] = (Magnitude, Wanda, Taylor, SparseGPT)
