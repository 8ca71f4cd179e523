"""``metrics.jsonl`` in the run folder: what training measured, one JSON object a line.

Fields: ``stage``, ``fingerprint``, ``attempt``, ``step``, ``time`` (Unix seconds), ``losses`` (part: value),
``learning_rate``, and after an evaluation ``dev`` (metric: value; null where it is not finite). A resumed run may
write a step again: the last line of a step counts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqat.errors import SqatError
from sqat.files.read import open_file, parse_json
from sqat.files.replace import append_text

METRICS_FILE = "metrics.jsonl"
MAX_LINE, MAX_STEP = 1 << 20, 1 << 40


@dataclass(frozen=True)
class MetricsLog:
    """Writes the lines of one attempt of a stage.

    Attributes:
        fingerprint: of the stage, so that a reader can tell runs of another recipe apart.
    """

    path: Path
    stage: str
    fingerprint: str
    attempt: int = 1

    def write(
        self, step: int, losses: Mapping[str, float], learning_rate: float, dev: Mapping[str, float] | None = None
    ) -> None:
        """Append the line of a step."""
        line: dict[str, Any] = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "attempt": self.attempt,
            "step": step,
            "time": round(time.time(), 3),
            "losses": dict(losses),
            "learning_rate": learning_rate,
        }
        if dev is not None:
            line["dev"] = {name: value if math.isfinite(value) else None for name, value in dev.items()}
        with suppress(OSError):  # a full disk ends the run where its state is saved
            append_text(self.path, json.dumps(line) + "\n")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file in order, without damaged lines, and without losses that are not finite.

    Raises:
        SqatError: the file cannot be read.
    """
    with open_file(path, root=path.parent) as file:
        while line := file.readline(MAX_LINE):
            with suppress(SqatError):
                entry = parse_json(line, METRICS_FILE)
                if is_entry(entry):
                    losses = {name: value for name, value in entry["losses"].items() if is_finite(value)}
                    yield {**entry, "losses": losses}


def is_entry(entry: Any) -> bool:
    """Whether a line holds what `MetricsLog.write` writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("losses"), dict):
        return False
    return type(entry.get("step")) is int and 0 <= entry["step"] <= MAX_STEP


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
