"""Calibrated 2:4 checkpoints of tiny encoders, of any placement, and their packed folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.semi_structured import write_packed
from tests.calibrated_encoders import calibrate

VOCABULARY = 65
MakeCheckpoint = Callable[..., Checkpoint]
WriteFolder = Callable[[Checkpoint], Path]
FOLDER = "semi-structured"


def texts(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random texts, the first of all ``tokens``, the others shorter and padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="session")
def calibrated(make_model: Callable[..., Any], tokenizer: Any) -> MakeCheckpoint:
    """`calibrated(family, placement, **settings)`: the calibrated checkpoint of a tiny model."""

    @cache
    def make(family: str = "bert", placement: str = "linear", **settings: Any) -> Checkpoint:
        return calibrate(make_model(family, **settings), TextProcessor(tokenizer), texts(3, 12), placement)

    return make


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """`write_folder(checkpoint)`: the folder of packed weights that the target writes."""

    def write(checkpoint: Checkpoint) -> Path:
        write_packed(checkpoint, quantize_model(checkpoint), tmp_path / FOLDER)
        return tmp_path / FOLDER

    return write


@pytest.fixture
def packed_folder(calibrated: MakeCheckpoint, write_folder: WriteFolder) -> Path:
    """The folder of the tiny BERT, placement linear."""
    return write_folder(calibrated())
