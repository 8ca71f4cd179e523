"""Many client threads on one session of sqat's CPU runtime for minutes, a second session beside it.

    scripts/benchmarks/load model.cpu-sparse.onnx --minutes 10 --clients 8 --json load.json

Each answer is compared bit for bit with that of a session of one thread. Resident memory is read once a second: growth
after a tenth of the time is a leak. Exit code 1 where an answer differs or a request fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.runtime import random_feeds, size_of
from sqat import runtime
from sqat.errors import SqatError
from sqat.files.replace import replace_file

Array = NDArray[Any]
REQUESTS = 24  # different ones
BATCHES, TOKENS = (1, 2, 4, 8), (8, 16, 32, 64, 128)
OTHER = 10  # of so many requests one goes to the second session


@dataclass(frozen=True)
class Request:
    """Inputs, and the bits that must come back."""

    feeds: dict[str, Array]
    answer: Array


@dataclass
class Served:
    """What one client saw."""

    texts: int = 0
    seconds: list[float] = field(default_factory=list)
    differed: int = 0
    failed: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Report:
    """What the JSON file holds; megabytes of resident memory, milliseconds, what a failed request said."""

    clients: int
    threads: int
    minutes: float
    calls: int
    texts_per_second: float
    median_ms: float
    p95_ms: float
    differed: int
    failed: int
    failure: str
    memory_early: float
    memory_end: float
    memory_most: float


def requests_of(path: Path) -> list[Request]:
    """Texts of many sizes, some padded, with the answers of a session of one thread."""
    size, session = size_of(path), runtime.session(path, threads=1)
    random, names = np.random.default_rng(0), {entry.name for entry in session.get_inputs()}
    made = []
    for _ in range(REQUESTS):
        tokens = min(int(random.choice(TOKENS)), size.tokens)
        feeds = random_feeds(int(random.choice(BATCHES)), tokens, size.vocabulary)
        lengths = random.integers(1, tokens + 1, len(feeds["input_ids"]))
        feeds["attention_mask"] = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        feeds = {name: each for name, each in feeds.items() if name in names}
        made.append(Request(feeds, session.run(None, feeds)[0]))
    return made


def send(sessions: Sequence[Any], requests: Sequence[Request], client: int, until: float, served: Served) -> None:
    """Send requests until the time is over, whatever becomes of one."""
    random, number = np.random.default_rng(client), client
    while time.monotonic() < until:
        request, number = requests[int(random.integers(len(requests)))], number + 1
        start = time.perf_counter()
        try:
            answer = sessions[number % OTHER == 0].run(None, request.feeds)[0]
        except Exception as error:  # of any kind: a thread that dies of it would not be missed
            served.failed += 1
            served.failure = served.failure or f"{type(error).__name__}: {error}"
            continue
        served.seconds.append(time.perf_counter() - start)
        served.texts += len(answer)
        served.differed += answer.tobytes() != request.answer.tobytes()


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def load(path: Path, minutes: float, clients: int, threads: int) -> Report:
    """Run the load and report it."""
    requests = requests_of(path)
    sessions = [runtime.session(path, threads=threads) for _ in range(2)]
    served, until = [Served() for _ in range(clients)], time.monotonic() + 60 * minutes
    workers = [
        threading.Thread(target=send, args=(sessions, requests, client, until, each))
        for client, each in enumerate(served)
    ]
    for worker in workers:
        worker.start()
    memory = [resident()]
    while any(worker.is_alive() for worker in workers):
        time.sleep(min(1.0, max(0.01, until - time.monotonic())))
        memory.append(resident())
    seconds = np.array([taken for each in served for taken in each.seconds])
    median, p95 = (round(float(np.percentile(seconds, q)) * 1e3, 2) if len(seconds) else 0.0 for q in (50, 95))
    early, end, most = (round(value, 1) for value in (memory[len(memory) // 10], memory[-1], max(memory)))
    texts = round(sum(each.texts for each in served) / (60 * minutes), 1)
    differed, failed = sum(each.differed for each in served), sum(each.failed for each in served)
    failure = next((each.failure for each in served if each.failed), "")
    return Report(
        clients, threads, minutes, len(seconds), texts, median, p95, differed, failed, failure, early, end, most
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the load; returns the exit code."""
    parser = argparse.ArgumentParser(
        "scripts/benchmarks/load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a file of target cpu-sparse")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of each session")
    parser.add_argument("--json", type=Path, help="where the report goes")
    arguments = parser.parse_args(words)
    try:
        report = load(arguments.model, arguments.minutes, arguments.clients, arguments.threads)
    except SqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(report)))
    if arguments.json:
        replace_file(arguments.json, (json.dumps(asdict(report), indent=1) + "\n").encode())
    return int(report.differed + report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
