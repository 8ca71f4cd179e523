"""What `recipes/results.json`, `tried.jsonl` and the files of a run's folder hold; checked on reading and writing.

Units: seconds, milliseconds where a name ends in `_ms`, bytes. A ratio is the baseline's time divided by the row's:
more is faster. Metrics are those of `sqat run`, "inf" where there is no wrong pair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sqat.bench.intervals import Interval
from sqat.checkpoint.manifest import Figure
from sqat.errors import SqatError
from sqat.files.replace import replace_file

STRICT = ConfigDict(extra="forbid")


class Row(BaseModel):
    """One result of one seed.

    Attributes:
        made_by: stage, or stage/target.
        size_bytes: of the file (of the tensors of a checkpoint).
        packed_bytes: of the same file if its 2:4 weights were stored packed; None where none is int8 or fp16 and 2:4.
    """

    model_config = STRICT

    made_by: str
    metrics: dict[str, Figure]
    size_bytes: int
    packed_bytes: int | None = None


class Stage(BaseModel):
    """How much work one stage was; seconds are those of its run, its interruptions not counted."""

    model_config = STRICT

    kind: str
    steps: int
    seconds: float


class Seed(BaseModel):
    """One run of a recipe.

    Attributes:
        commit: of the repository when it ran, "" where that is not known.
        data_digest: of what the rows were measured on.
        cpu, threads: of the run, "" and 0 where that is not known.
    """

    model_config = STRICT

    commit: str = ""
    versions: dict[str, str] = {}
    data_digest: str = ""
    cpu: str = ""
    threads: int = 0
    rows: dict[str, Row]
    stages: dict[str, Stage]


class Timing(BaseModel):
    """Time of one call: CPU time of the process, and wall time, which other load on the machine makes longer."""

    model_config = STRICT

    cpu_ms: float
    cpu_p95_ms: float
    wall_ms: float
    wall_p95_ms: float
    cpu_against: dict[str, Interval] = {}
    wall_against: dict[str, Interval] = {}


class Setting(BaseModel):
    """One size of input: rows of a batch, tokens of a row (None: the input has no such dimension)."""

    model_config = STRICT

    batch: int
    sequence: int | None = None
    rounds: int
    rows: dict[str, Timing]


class Latency(BaseModel):
    """How fast one seed's files are in ONNX Runtime, all in one process on one core.

    Attributes:
        load: of the machine in the minute before, in processes.
        made_from: row -> digest of the manifest of the stage that wrote its file.
        left_out: rows that were not timed, with the reason.
        skipping: rows that sqat's own kernels computed, which skip zeros.
    """

    model_config = STRICT

    seed: int
    cpu: str
    threads: int
    load: float
    versions: dict[str, str]
    settings: list[Setting]
    made_from: dict[str, str]
    left_out: dict[str, str] = {}
    skipping: list[str] = []


class DataFile(BaseModel):
    """What a split was read from."""

    model_config = STRICT

    file: str
    sha256: str
    limit: int | None = None


class Pictures(BaseModel):
    """Figures of the pictures that two models draw for the same prompts and seeds."""

    model_config = STRICT

    file: str
    figures: dict[str, Figure]


class PairInterval(BaseModel):
    """The 95 % interval of a row's metric minus another row's: bootstrap over seeds and over the rows of the split."""

    model_config = STRICT

    row: str
    against: str
    metric: str
    low: Figure
    high: Figure


class Application(BaseModel):
    """All of one recipe; ``labels`` are its rows, run or not."""

    model_config = STRICT

    recipe: str
    about: str
    model: str
    split: str
    labels: list[str] = []
    commands: list[str]
    data: dict[str, DataFile]
    seeds: dict[int, Seed]
    intervals: list[PairInterval] = []
    latency: Latency | None = None
    pictures: Pictures | None = None
    missing: list[str] = []


class ResultsFile(BaseModel):
    """`recipes/results.json`."""

    model_config = STRICT

    format: Literal[1] = 1
    applications: dict[str, Application]


class RunRecord(BaseModel):
    """`run.json` in a run's folder: what `scripts/results/make run` started last, and how it ended."""

    model_config = STRICT

    command: list[str]
    commit: str
    versions: dict[str, str]
    cpu: str = ""
    threads: int
    seconds: float | None = None
    exit: int | None = None


class Try(BaseModel):
    """One line of `recipes/tried.jsonl`: what was other than in the recipe of the day, and what came of it."""

    model_config = STRICT

    recipe: str
    changed: dict[str, object]
    seed: int
    split: Literal["dev"] = "dev"
    stage: str = ""
    figures: dict[str, Figure]
    seconds: float
    verdict: str


Parsed = TypeVar("Parsed", bound=BaseModel)


def read(kind: type[Parsed], path: Path) -> Parsed | None:
    """Read and check a file; None where there is none.

    Raises:
        SqatError: it is no such JSON, with the first thing that is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SqatError(
            f"{where}: {first['msg']}", "was it written by scripts/results?", str(path), code="unreadable-file"
        ) from None


def write(value: BaseModel, path: Path) -> None:
    """Check a value once more and write it as JSON, whole or not at all."""
    checked = type(value).model_validate(value.model_dump())
    text = json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())
