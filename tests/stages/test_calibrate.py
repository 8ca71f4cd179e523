"""What a calibrate stage reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sqat.recipe.stages import CalibrateConfig
from sqat.stages.calibrate import sample_batches


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
