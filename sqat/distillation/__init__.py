"""Distillation losses on tensors; MiniLM's: one file a loss, with its settings and its code.

A recipe, `sqat.api` and the reference page take their names from `LOSSES`; `sqat.distillation.outputs` has the
functions of `OutputLossName`.
"""

from __future__ import annotations

from typing import Literal

from sqat.distillation.minilm_v1 import MiniLMv1
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relation_loss import RelationLoss as RelationLoss

LOSSES: tuple[type[RelationLoss], ...] = (MiniLMv1, MiniLMv2)
OutputLossName = Literal["kl", "mse", "listwise", "margin-mse", "cosine", "l2", "similarities"]
LIST_LOSSES = ("listwise", "margin-mse")  # of all rows of a query, which share a batch
