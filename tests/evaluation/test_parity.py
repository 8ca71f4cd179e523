"""On a few rows only a fault that most rows show counts: one row that fell to the other side of a tie does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sqat.checkpoint.store import Checkpoint
from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.evaluation.evaluate import served_model
from sqat.evaluation.inference import logits_of
from sqat.evaluation.parity import check_resemblance
from sqat.export.source import TargetFile
from tests.errors import raises_code
from tests.tiny import colour_rows

ROWS = 4


@pytest.mark.parametrize(
    ("rows_off", "by", "is_refused"),
    [(0, 0.0, False), (1, 10.0, False), (2, 10.0, False), (3, 10.0, True), (4, 0.05, True), (4, float("nan"), True)],
)
def test_most_rows_decide(
    rows_off: int, by: float, is_refused: bool, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    checkpoint = make_checkpoint()
    wrong = torch.tensor([by] * rows_off + [0.0] * (ROWS - rows_off))[:, None]
    with served_model(checkpoint) as (model, processor):
        labelled = Rows.from_list([{**row, "label": 0} for row in colour_rows(ROWS, 1)])
        rows = processor.prepare(labelled, 16)

        def forward(batch: Batch) -> Tensor:
            return logits_of(model, batch) + wrong

        if is_refused:
            with raises_code("parity"):
                check_resemblance("model.onnx", forward, TargetFile(checkpoint), rows)
        else:
            check_resemblance("model.onnx", forward, TargetFile(checkpoint), rows)
