"""The refusals that are expected, each with its reason; any other refusal is a failure, and so is one that is gone."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.families.registry import FAMILIES
from sqat.errors import ErrorCode

ALL = ("*",)


@dataclass(frozen=True)
class Refusal:
    """A refusal that is right, and why.

    Attributes:
        placement: of the recipe; ``qat`` for the default distillation.
        targets: of the export; ``*`` for all.
        families: names, or ``*``; a name with a plus stands for all families with this trait.
        but: families that it does not hold for.
    """

    placement: str
    targets: tuple[str, ...]
    families: tuple[str, ...]
    code: ErrorCode
    reason: str
    but: tuple[str, ...] = ()

    def holds(self, name: str, placement: str, target: str) -> bool:
        """Say whether it is expected of a family, with a placement and a target."""
        if self.placement not in (placement, "*"):
            return False
        if self.targets != ALL and target not in self.targets:
            return False
        return self.families == ALL or name in self.families or bool(self.traits & set(FAMILIES[name].traits))

    @property
    def traits(self) -> set[str]:
        """Traits whose families it holds for."""
        return {name.removeprefix("+") for name in self.families if name.startswith("+")}


def expected_refusal(name: str, placement: str, target: str) -> Refusal | None:
    """Return the refusal that is expected; None where the family must work."""
    found = (each for each in REFUSALS if name not in each.but and each.holds(name, placement, target))
    return next(found, None)


SERVED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
REFUSALS = (
    Refusal(
        "cpu", ALL, ALL, "unsupported-model", "the kernels of `cpu-sparse` compute six families of encoders", SERVED
    ),
)
