"""What `sqat bench` measures, as it writes it to JSON: every time with its spread, the machine and its load."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sqat.bench.intervals import Interval
from sqat.bench.parity import Parity
from sqat.checkpoint.outputs import MADE_BY

STRICT = ConfigDict(extra="forbid")


class Subject(BaseModel):
    """A candidate.

    Attributes:
        path: absolute.
        file_bytes: of the file with its external data, or of the folder's tensors.
        memory_bytes: growth of a process that serves it at the largest size; None if not measured.
    """

    model_config = STRICT

    path: str
    backend: str
    file_bytes: int
    memory_bytes: int | None


class Timing(BaseModel):
    """One candidate at one input size.

    Attributes:
        p50_ms: median call with its interval over the rounds.
        p95_ms: of all calls.
        rows_per_second: batch size over the median call.
        speedup: baseline's time over this candidate's time; None for the baseline.
        parity: difference from the baseline's output; None for the baseline.
    """

    model_config = STRICT

    p50_ms: Interval
    p95_ms: float
    calls: int
    rows_per_second: float
    speedup: Interval | None
    parity: Parity | None


class Setting(BaseModel):
    """One input size; ``reached`` says whether every interval is narrow enough."""

    model_config = STRICT

    batch: int
    sequence: int | None
    rounds: int
    reached: bool
    rows: dict[str, Timing]


class Report(BaseModel):
    """All of one measurement.

    Attributes:
        load: processes at work, mean of a minute, before the first call and after the last.
        within: half-width of the intervals to reach, as a share.
        left_out: skipped candidates with the reason.
        no_memory: candidates whose memory is unknown, with the reason.
    """

    model_config = STRICT

    format: int = 1
    comment: str = MADE_BY
    cpu: str
    cores: int
    threads: int
    load: list[float]
    versions: dict[str, str]
    baseline: str
    within: float
    subjects: dict[str, Subject]
    left_out: dict[str, str]
    no_memory: dict[str, str] = {}
    settings: list[Setting]


def size_text(batch: int, tokens: int | None) -> str:
    """Format an input size as ``batch 8, 128 tokens``."""
    return f"batch {batch}" + (f", {tokens} tokens" if tokens is not None else "")
