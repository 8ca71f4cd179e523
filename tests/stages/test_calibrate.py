"""What a calibrate stage reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sqat import cli
from sqat.checkpoint.manifest import load_manifest
from sqat.quantization.calibrators.auto import CANDIDATES
from sqat.recipe.stages import CalibrateConfig
from sqat.stages.calibrate import sample_batches
from tests.tiny import write_project


@pytest.mark.pipeline
@pytest.mark.parametrize("placement", ["linear", "tensorrt-full", "cpu"])
def test_a_recipe_keeps_the_method_that_auto_chose(
    placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path)
    text = project.recipe.read_text()
    stages = f"stages:\n  train: {{steps: 0}}\n  calibrate: {{method: auto, samples: 16, placement: {placement}}}\n"
    project.recipe.write_text(text[: text.index("stages:")] + stages)
    for command in ("train", "calibrate"):
        assert cli.main([command, str(project.recipe)]) == 0
    assert "amax by " in "".join(capsys.readouterr())
    folder = next(project.folder.glob("runs/**/*-calibrate"))
    sites = load_manifest(folder).sites
    assert {record.method for record in sites.values()} <= set(CANDIDATES)
    assert all(record.method == sites[record.shared_with].method for record in sites.values())
    assert cli.main(["inspect", str(folder)]) == 0
    assert "amax by" in capsys.readouterr().out


class Rows(dict[str, Any]):
    """Four rows of one length."""

    def __len__(self) -> int:
        return 4

    def with_format(self, *_: Any, **__: Any) -> Any:
        return self

    def __getitem__(self, _: Any) -> Any:
        return {"length": np.ones(4, np.int64)}


def test_a_processor_draws_the_same_whatever_ran_before() -> None:
    """Noise and times of the pictures that calibration observes."""
    drawn: list[torch.Tensor] = []

    class Processor:
        def collate(self, rows: Any, indices: list[int]) -> Any:
            drawn.append(torch.randn(2))
            return self

        def to(self, device: Any) -> Any:
            return self

    class Context:
        recipe = type("Recipe", (), {"seed": 3})
        splits = type("Splits", (), {"prepared": staticmethod(lambda split, processor: Rows())})

    for seed in (1, 2):
        torch.manual_seed(seed)
        sample_batches(CalibrateConfig(), Context(), Processor())  # type: ignore[arg-type]
    assert torch.equal(drawn[0], drawn[1])
