"""What every loss on relations between tokens has: settings, and a value for two attention layers.

Torch is imported where tensors are handled only: a recipe is checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.distillation.relations import QKV


class RelationLoss(ABC):
    """Base of these losses; a subclass is a frozen dataclass whose fields are the keys of a recipe."""

    name: str
    relation_heads: int | None = None  # into how many heads projections are split; None: the attention's own

    @abstractmethod
    def __call__(self, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        """Return the loss, a scalar; the teacher gets no gradient.

        Args:
            attention_mask: [B, T], non-zero at real tokens.

        Raises:
            ValueError: head counts or shapes do not fit, or only one of the two is a decoder.
        """
