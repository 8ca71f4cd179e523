"""MiniLMv2 (arXiv:2012.15828): QQ, KK and VV relations of heads split anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.distillation.relation_loss import RelationLoss

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.distillation.relations import QKV


@dataclass(frozen=True)
class MiniLMv2(RelationLoss):
    """QQ, KK and VV relations over ``relation_heads`` new heads (arXiv:2012.15828).

    Attributes:
        relation_heads: must divide both widths; None takes the teacher's attention heads.
    """

    name: Literal["minilm-v2"] = "minilm-v2"
    relation_heads: int | None = None

    def __post_init__(self) -> None:
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads must be at least 1, got {self.relation_heads}")

    def __call__(self, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        from sqat.distillation.relations import compare_relations

        heads = self.relation_heads or teacher.heads
        pairs = (("query", "query"), ("key", "key"), ("value", "value"))
        return compare_relations(student, teacher, pairs, heads, attention_mask, "relation heads")
