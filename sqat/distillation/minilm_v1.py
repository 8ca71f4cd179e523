"""MiniLM (arXiv:2002.10957): attention (Q, K) and value relations (V, V), head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.distillation.relation_loss import RelationLoss

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.distillation.relations import QKV


@dataclass(frozen=True)
class MiniLMv1(RelationLoss):
    """Attention and value relations, head by head (arXiv:2002.10957); student and teacher have equally many heads."""

    name: Literal["minilm-v1"] = "minilm-v1"

    def __call__(self, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        from sqat.distillation.relations import compare_relations

        if student.heads != teacher.heads:
            raise ValueError(
                f"minilm-v1 needs equal head counts, got {student.heads} in the student and "
                f"{teacher.heads} in the teacher; minilm-v2 does not"
            )
        pairs = (("query", "key"), ("value", "value"))
        return compare_relations(student, teacher, pairs, student.heads, attention_mask)
