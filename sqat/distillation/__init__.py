"""Distillation losses on tensors; MiniLM's: one file a loss, with its settings and its code.

A recipe, `sqat.api` and the reference page take their names from `LOSSES`.
"""

from __future__ import annotations

from sqat.distillation.minilm_v1 import MiniLMv1
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relation_loss import RelationLoss as RelationLoss

LOSSES: tuple[type[RelationLoss], ...] = (MiniLMv1, MiniLMv2)
