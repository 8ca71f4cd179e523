"""Quality gates of a recipe: how good a stage's result must be on dev, and how often the stage may try.

Gates say what becomes of a result, not what it is: they are left out of a stage's key (`sqat.pipeline.fingerprint`),
and `sqat.pipeline.quality_gates` judges them from the figures of the checkpoints. Left out: metrics where less is
better.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Gate(BaseModel):
    """What a metric must reach on dev; with several limits the highest counts."""

    model_config = STRICT

    min: float | None = Field(default=None, description="lowest value that passes")
    max_drop: float | None = Field(default=None, ge=0, description="most it may lie below the same metric of 'against'")
    against: str | None = Field(default=None, description="stage to compare with; default: the one it starts from")

    @model_validator(mode="after")
    def limited(self) -> Gate:
        if self.min is None and self.max_drop is None:
            raise ValueError("a gate needs min, max_drop or both")
        if self.against is not None and self.max_drop is None:
            raise ValueError("against belongs to max_drop, which is not given")
        return self


class Retry(BaseModel):
    """More attempts for a stage that misses its gates, each with more steps than the one before."""

    model_config = STRICT

    times: int = Field(default=1, ge=1, le=10, description="attempts after the first")
    steps_multiplier: float = Field(
        default=2.0, gt=1, le=100, description="factor on the steps from one attempt to the next"
    )


GATES: dict[str, Gate] = {}
GATES_WORDS = "metric -> limit that the result must keep on dev; else it is set aside and the run stops (exit code 3)"
