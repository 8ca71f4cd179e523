"""The JSON schema for editors."""

from __future__ import annotations

from sqat.distillation import LOSSES
from sqat.quantization.calibrators import CALIBRATORS
from sqat.recipe.json_schema import recipe_schema
from sqat.sparsity.criteria import CRITERIA
from sqat.sparsity.schedules import SCHEDULES


def test_every_key_has_a_description() -> None:
    schema = recipe_schema()
    parts = {part.__name__ for table in (CALIBRATORS, CRITERIA, LOSSES, SCHEDULES) for part in table}
    undescribed = {
        (name, key)
        for name, definition in schema["$defs"].items()
        if name not in parts
        for key, part in definition["properties"].items()
        if "description" not in part
    }
    assert not undescribed
    assert schema["required"] == ["model", "task", "data", "stages"]
    assert schema["$defs"]["DenseTrainConfig"]["properties"]["batch_size"]["default"] == 32
