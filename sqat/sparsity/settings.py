"""What a recipe may say of pruning: mask criteria and schedules, each by its name and its knobs.

Settings only, without torch, so that a recipe is read and checked in no time. What they mean for tensors is in
`sqat.sparsity.criteria`, `sqat.sparsity.sparsegpt` and `sqat.sparsity.schedule`, in one function each that tells them
apart; a new one joins the alias at the end of its part, and mypy then asks for its case. The first field is what a
recipe calls it, the docstring what its reference says of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from sqat.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Magnitude:
    """|w|: what is smallest changes the output least, all inputs being alike."""

    name: Literal["magnitude"] = "magnitude"
    needs: ClassVar[Literal["nothing"]] = "nothing"


@dataclass(frozen=True)
class Wanda:
    """|w| times the norm of its input (arXiv:2306.11695): a small weight on a large input matters too."""

    name: Literal["wanda"] = "wanda"
    samples: int = 256
    needs: ClassVar[Literal["squares"]] = "squares"

    def __post_init__(self) -> None:
        _check_samples(self.samples)


@dataclass(frozen=True)
class Taylor:
    """|w dL/dw|: how much the loss moves, to first order, if the weight goes (arXiv:1906.10771).

    ``average`` says how batches are brought together: the root of the mean of the squares, or the size of the mean,
    in which what pulls to both sides cancels.
    """

    name: Literal["taylor"] = "taylor"
    samples: int = 256
    average: Literal["squares", "mean"] = "squares"

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    @property
    def needs(self) -> Literal["gradients", "gradient-squares"]:
        """What the batches' gradients are summed as."""
        return "gradients" if self.average == "mean" else "gradient-squares"


@dataclass(frozen=True)
class SparseGPT:
    """Prune by the Hessian of the layer's output and correct the weights that stay.

    ``samples`` train rows are observed before each mask; ``damping`` is added to the diagonal of X'X, as a share of
    its mean.
    """

    name: Literal["sparsegpt"] = "sparsegpt"
    samples: int = 256
    damping: float = 0.01
    needs: ClassVar[Literal["gram"]] = "gram"

    def __post_init__(self) -> None:
        _check_samples(self.samples)
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be a number above 0, got {self.damping:g}")


def _check_samples(samples: int) -> None:
    """A criterion that observes needs a row."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


Criterion = Magnitude | Wanda | Taylor | SparseGPT
Steps = int | tuple[float, ...]


@dataclass(frozen=True)
class PerGroup:
    """The same number of zeros in every group, or one more in those whose next weight is smallest.

    ``steps`` is a number of equal steps, or the growing sparsities themselves, the last that of the pattern.
    """

    name: Literal["per-group"] = "per-group"
    steps: Steps = 2
    regrow: bool = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each step; the last is ``pattern.sparsity``."""
        return _fractions(self.steps, pattern)


@dataclass(frozen=True)
class GroupFraction:
    """A growing share of groups holds the whole pattern; the others are dense.

    ``steps`` as in `PerGroup`; a group loses the sum of the scores it would give up.
    """

    name: Literal["group-fraction"] = "group-fraction"
    steps: Steps = 4
    regrow: bool = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each step; the last is ``pattern.sparsity``."""
        return _fractions(self.steps, pattern)


@dataclass(frozen=True)
class SrSte:
    """N:M chosen anew before every step; pruned weights learn too, and decay (SR-STE, arXiv:2102.04010).

    The gradient of the masked weight goes straight through to all weights, and pruned ones get ``decay`` times
    themselves on top, so that masks settle. After the share ``until`` of
    the steps the mask stays.
    """

    name: Literal["sr-ste"] = "sr-ste"
    decay: float = 2e-4
    until: float = 1.0

    def __post_init__(self) -> None:
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be a number of at least 0, got {self.decay:g}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until:g}")

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """The one sparsity of all steps."""
        return (pattern.sparsity,)


def _check_steps(steps: Steps) -> None:
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return
    growing = all(low < high for low, high in zip((0.0, *steps), steps, strict=False))
    if not steps or not growing or steps[-1] >= 1:
        raise ValueError(f"steps must be growing fractions between 0 and 1, got {list(steps)}")


def _fractions(steps: Steps, pattern: Pattern) -> tuple[float, ...]:
    target = pattern.sparsity
    if isinstance(steps, int):
        return (*(target * step / steps for step in range(1, steps)), target)
    if not math.isclose(steps[-1], target, abs_tol=1e-6):
        raise ValueError(f"steps must end at {target:g}, the sparsity of {pattern}, got {steps[-1]:g}")
    return (*steps[:-1], target)


Schedule = PerGroup | GroupFraction | SrSte
