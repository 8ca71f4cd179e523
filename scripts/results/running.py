"""Run seeds of recipes: one `sqat run` for each, in its own folder, some at a time.

A seed with all its rows is skipped. A seed that fails stops no other. A run holds a lock on a file of its folder, which
its process inherits. Several processes share the cores.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from scripts.results.collecting import RECORD, Run, collect_seed
from scripts.results.schema import RunRecord, read, write
from sqat.errors import SqatError
from sqat.hardware.machine import describe_processor

LOCK, LOG = ".results.lock", "results.log"
PACKAGES = ("sqat", "torch", "transformers", "sentence-transformers", "diffusers", "datasets", "numpy", "onnx",
            "onnxruntime")  # fmt: skip


def run_all(runs: list[Run], processes: int, again: bool = False) -> int:
    """Run seeds, ``processes`` at a time, and say how each ends; returns how many failed."""
    threads, failed = max(1, (os.cpu_count() or 1) // processes), 0
    pool = ThreadPoolExecutor(processes)
    try:
        waiting = {pool.submit(run_one, run, threads, again): run for run in runs}
        for done in as_completed(waiting):
            run = waiting[done]
            try:
                news = done.result()
            except (SqatError, OSError) as error:
                failed += 1
                news = f"failed: {error}"
            report(run, news)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def run_one(run: Run, threads: int, again: bool = False) -> str:
    """Run one seed, unless it is done, and return what came of it.

    Raises:
        SqatError: the run ended with an error (its last line is told), or goes on elsewhere.
    """
    loaded = run.load()
    folder = loaded.run_directory
    if not again and not collect_seed(loaded)[1]:
        return "done already"
    command = ["sqat", "run", str(run.recipe), "--json", "--quiet"]
    command += [part for override in run.overrides for part in ("--set", override)]
    record = RunRecord(command=command, commit=commit(), versions=versions(), cpu=describe_processor().name,
                       threads=threads)  # fmt: skip
    with lock(folder) as descriptor, (folder / LOG).open("wb") as log:
        write(record, folder / RECORD)
        report(run, "started")
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=log,
                              pass_fds=[descriptor], env={**os.environ, "OMP_NUM_THREADS": str(threads)})  # fmt: skip
        seconds = time.monotonic() - begun
    write(record.model_copy(update={"seconds": round(seconds, 1), "exit": done.returncode}), folder / RECORD)
    if done.returncode:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SqatError(
            lines[-1] if lines else f"exit code {done.returncode}", place=str(folder / LOG), code="lost-process"
        )
    return f"done in {seconds:.0f} s"


def report(run: Run, news: str) -> None:
    """One line about one seed."""
    print(f"{time.strftime('%H:%M:%S')} {run.recipe.stem} seed {run.seed}: {news}", flush=True)


@contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Hold the lock of a run's folder; the file descriptor is for the process that runs.

    Raises:
        SqatError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SqatError("this seed is running in another process", place=str(folder), code="locked") from None
        yield file.fileno()


def is_running(folder: Path) -> bool:
    """Whether a process of `run_one` is at work in a folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with lock(folder):
            return False
    except SqatError:
        return True


def status_of(run: Run) -> str:
    """One seed in a few words: done, running, failed, or how much of it is there."""
    loaded = run.load()
    folder = loaded.run_directory
    if not folder.is_dir():
        return "missing"
    seed, skipped = collect_seed(loaded)
    stages = f"{len(seed.stages)} of {len(loaded.recipe.stages)} stages, {len(seed.rows)} rows"
    if is_running(folder):
        return f"running: {stages}"
    if not skipped:
        return f"done: {stages}, {sum(stage.seconds for stage in seed.stages.values()) / 60:.0f} min"
    record = read(RunRecord, folder / RECORD)
    ended = f"failed (see {folder / LOG})" if record and record.exit else "stopped"
    return f"{ended}: {stages}; {next(iter(skipped.values()))}"


def commit() -> str:
    """The repository's commit, with + where tracked files differ from it; "" outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Python and those of `PACKAGES` that are installed."""
    installed = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    packages = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **packages}
