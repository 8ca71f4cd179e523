"""Faults in time: kill -9, Ctrl-C and SIGTERM at random moments, two runs at once, clocks that jump."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial

from scripts.faults.project import Ended, Project
from scripts.faults.tally import BEFORE, INTERRUPTED, Tally

KILLED = {-9: "killed", 0: BEFORE}
STOPPED = {INTERRUPTED: "stopped and saved", 0: BEFORE}


def kill(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """kill -9, again and again until the run gets through; then afresh."""
    tally = Tally("kill -9", "SIGKILL at a uniformly random moment, then the same command")
    return interrupt(project, count, draw, whole, expected, tally, [signal.SIGKILL], KILLED)


def stop(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """SIGINT and SIGTERM in turns."""
    tally = Tally("SIGINT and SIGTERM", "one signal at a uniformly random moment, then the same command")
    return interrupt(project, count, draw, whole, expected, tally, [signal.SIGINT, signal.SIGTERM], STOPPED)


def interrupt(
    project: Project, count: int, draw: random.Random, whole: Ended, expected: str,
    tally: Tally, numbers: list[signal.Signals], allowed: dict[int, str],
) -> Tally:  # fmt: skip
    """Disturb runs of one folder until ``count`` faults came through; a run that gets to its end is compared."""
    project.clear()
    while tally.done < count:
        running = project.start()
        ended = running.wait(draw.uniform(0.1, 0.6) * whole.seconds)
        if ended is None:
            stage = project.stage_reached()
            os.kill(running.pid, numbers[tally.done % len(numbers)])
            ended = running.end()
            tally.note(ended, stage, allowed)
            tally.check_folder(project)
        if ended.code == 0:
            tally.check_result(project, ended, expected)
            project.clear()
    tally.check_result(project, project.run(), expected)
    return tally


def double(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """A second run in the folder of a first: it is told, and the first does not notice."""
    tally = Tally("two runs in one folder", "a second run at a random moment of the first, or at once")
    for number in range(count):
        project.clear()
        first = project.start()
        if number % 2:
            time.sleep(draw.uniform(0.05, 0.7) * whole.seconds)
            stage, both = project.stage_reached(), [project.start(), first]
        else:
            stage, both = "at once", [project.start(), first]
        ends = [each.end() for each in both]
        refused = next((end for end in ends if end.code), ends[0])
        tally.note(refused, stage, {2: "told who holds the folder"})
        if "another run holds this folder: pid" not in refused.error and "began this very moment" not in refused.error:
            tally.violations.append(f"not refused in one line: {refused.error[-300:]}")
        tally.check_result(project, min(ends, key=lambda end: end.code), expected)
    return tally


def jump(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """The wall clock jumps by years at every look, and all files are from 1970 or 2100."""
    tally = Tally("clock jumps", "time.time() patched in the process to jump up to 30 years; os.utime of all files")
    for _ in range(count):
        project.clear()
        running = project.start(before=partial(jumping, draw.getrandbits(32)))
        ended = running.wait(draw.uniform(0.2, 0.8) * whole.seconds)
        stage = project.stage_reached()
        if ended is None:
            os.kill(running.pid, signal.SIGKILL)
            ended = running.end()
        tally.note(ended, stage, {-9: "killed", 0: "finished"})  # the clock jumped in either
        tally.check_folder(project)
        for path in project.run_folder.rglob("*"):
            when = draw.choice((0, 4_102_444_800))
            os.utime(path, (when, when))
        again = project.run(before=partial(jumping, draw.getrandbits(32)))
        tally.check_result(project, again, expected)
    return tally


def jumping(seed: int) -> None:
    """Make the wall clock of this process jump."""
    true, draw = time.time, random.Random(seed)
    time.time = lambda: true() + draw.uniform(-1e9, 1e9)
