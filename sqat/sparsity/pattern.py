"""N:M, a pattern of sparsity: keep N of each group of M. Recipes and linters use it without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """Keep ``n`` of each aligned group of ``m``, 1 <= n < m <= 32."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 32:
            raise ValueError(f"pattern {self.n}:{self.m} must keep N of M with 1 <= N < M <= 32")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are pruned."""
        return (self.m - self.n) / self.m


def parse_pattern(text: str) -> Pattern:
    """Return the pattern of ``"N:M"``; ValueError says what is allowed."""
    n, colon, m = text.partition(":")
    if not (colon and n.isascii() and n.isdigit() and m.isascii() and m.isdigit()):
        raise ValueError(f"pattern {text!r} is not of the form N:M, for instance 2:4")
    return Pattern(int(n), int(m))
