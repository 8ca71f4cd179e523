"""Who teaches a stage that distils: a stage, another model, or outputs that are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from sqat.recipe.fields import STRICT, Short


@dataclass(frozen=True)
class ShortTeacher(Short):
    """Let a bare text stand for a stage, or for a source where it has a / or : as folders and hub names have."""

    def expand(self, value: Any) -> Any:
        is_source = isinstance(value, str) and ("/" in value or ":" in value)
        return {"source": value} if is_source else super().expand(value)


class TeacherConfig(BaseModel):
    """Who teaches: a stage, another model with the same outputs, or a column with stored outputs."""

    model_config = STRICT

    stage: str | None = Field(default=None, description="dense ancestor")
    source: str | None = Field(
        default=None, description="model with the same outputs: a folder, a hub name, or package:NAME/FOLDER"
    )
    revision: str | None = Field(default=None, description="hub revision of the source")
    max_length: int | None = Field(
        default=None, ge=4, le=8192, description="tokens to which the source truncates; default: model.max_length"
    )
    column: str | None = Field(
        default=None, description="column of stored outputs: a number, a list, or one number for each label"
    )
    file: str | None = Field(default=None, description="file with the column and the texts; default: data.train.path")

    @model_validator(mode="after")
    def check_one(self) -> TeacherConfig:
        if sum(value is not None for value in (self.stage, self.source, self.column)) != 1:
            raise ValueError("stage, source and column exclude each other: give exactly one of them")
        for key, owner in (("revision", self.source), ("max_length", self.source), ("file", self.column)):
            if getattr(self, key) is not None and owner is None:
                raise ValueError(f"{key} belongs to {'column' if key == 'file' else 'source'}")
        return self

    @property
    def label(self) -> str:
        """What the teacher is called in a plan."""
        if self.column is not None:
            return f"column {self.column!r} of {self.file or 'data.train'}"
        return self.stage or str(self.source)


Teacher = Annotated[TeacherConfig, ShortTeacher("stage")]
