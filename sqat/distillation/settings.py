"""What a recipe may say of distillation: each MiniLM loss by its name and its knobs.

Settings only, without torch, so that a recipe is read and checked in no time; what they mean for q, k and v is in
`sqat.distillation.minilm`. A new one joins the alias at the foot, and mypy then asks for its case there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MiniLMv1:
    """Attention and value relations, head by head (arXiv:2002.10957)."""

    name: Literal["minilm-v1"] = "minilm-v1"


@dataclass(frozen=True)
class MiniLMv2:
    """QQ, KK and VV relations over ``relation_heads`` new heads (arXiv:2012.15828).

    Attributes:
        relation_heads: must divide both widths; None takes the teacher's attention heads.
    """

    name: Literal["minilm-v2"] = "minilm-v2"
    relation_heads: int | None = None

    def __post_init__(self) -> None:
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads must be at least 1, got {self.relation_heads}")


MiniLMLoss = MiniLMv1 | MiniLMv2
