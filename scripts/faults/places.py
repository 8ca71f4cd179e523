"""Faults in space: a full disk, a folder that cannot be written, files that were changed or cut."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from scripts.faults.project import STAGES, Ended, Project
from scripts.faults.tally import Tally

PAGE = 4096
AMPLE = 256 << 20


def mount(*arguments: str) -> bool:
    """Whether a mount command went well."""
    found = shutil.which("mount")
    return found is not None and subprocess.run([found, *arguments], capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own in memory; False where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = mount("-t", "tmpfs", "-o", f"size={AMPLE}", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """The disk is full at a random byte; then there is room again."""
    project.clear()
    with small_disk(project.runs) as mounted:
        how = "tmpfs of a random size" if mounted else "RLIMIT_FSIZE of a random size, in place of a small disk"
        tally = Tally("disk full", how)
        project.run()
        files = [path.stat().st_size for path in project.run_folder.rglob("*") if path.is_file()]
        most = 2 * sum(files) if mounted else max(files)
        for _ in range(count):
            project.clear()
            size = PAGE * draw.randrange(1, max(2, most // PAGE))
            if mounted:
                mount("-o", f"remount,size={size}", str(project.runs))
                ended = project.run()
            else:
                ended = project.run(before=partial(limit_files, size))
            tally.note(ended, project.stage_reached(), {2: "told in one line", 0: "fitted"})
            tally.check_folder(project)
            if mounted:
                mount("-o", f"remount,size={AMPLE}", str(project.runs))
            tally.check_result(project, project.run(), expected)
        project.clear()
    return tally


def limit_files(size: int) -> None:
    """No file of this process may grow beyond ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def lock_out(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """The folder is read-only after a random stage; then it can be written again."""
    project.clear()
    with small_disk(project.runs) as mounted:
        tally = Tally("read-only folder", "tmpfs remounted read-only" if mounted else "no write permission")
        if not mounted and os.geteuid() == 0:
            tally.skipped = "root may write anywhere, and nothing can be mounted"
            return tally
        for number in range(count):
            project.clear()
            if number % (len(STAGES) + 1):
                project.run("--to", STAGES[number % (len(STAGES) + 1) - 1])
            project.run_folder.mkdir(parents=True, exist_ok=True)
            stage = project.stage_reached()
            make_writable(project, mounted, False)
            ended = project.run()
            make_writable(project, mounted, True)
            tally.note(ended, stage, {2: "told in one line"})
            tally.check_folder(project)
            tally.check_result(project, project.run(), expected)
        project.clear()
    return tally


def make_writable(project: Project, mounted: bool, writable: bool) -> None:
    """Let the run folder be written, or not."""
    if mounted:
        mount("-o", f"remount,{'rw' if writable else 'ro'}", str(project.runs))
    else:
        project.run_folder.chmod(0o755 if writable else 0o555)


def damage(project: Project, count: int, draw: random.Random, whole: Ended, expected: str) -> Tally:
    """A bit is flipped, or the end cut off, in a random file of a finished or of a stopped run."""
    tally = Tally("damaged files", "one bit flipped, or the file cut, in a finished run or in one stopped midway")
    templates = [project.folder / "finished", project.folder / "midway"]
    project.clear()
    project.run()
    shutil.copytree(project.run_folder, templates[0])
    while not list(project.run_folder.glob(".02-prune.state/state.json")):
        project.clear()
        running = project.start()
        while project.stage_reached() == "train" or not list(project.run_folder.glob(".02*/state.json")):
            if running.wait(0.0) is not None:
                break
        else:
            os.kill(running.pid, signal.SIGKILL)
            running.end()
    shutil.copytree(project.run_folder, templates[1])
    for number in range(count):
        project.clear()
        shutil.copytree(templates[number % 2], project.run_folder)
        files = sorted(
            path
            for path in project.run_folder.rglob("*")
            if path.is_file() and path.name not in ("metrics.jsonl", "sqat.log")
        )
        file = draw.choice(files)
        spoil(file, draw)
        ended = project.run()
        name = str(file.relative_to(project.run_folder))
        tally.note(ended, name.split("/")[0], {0: "made again", 2: "told in one line"})
        if ended.code == 0:
            tally.check_result(project, ended, expected)
        elif file.name not in ended.error:
            tally.violations.append(f"{name} is not named: {ended.error[-300:]}")
        if ended.code == 0 and project.damaged():
            tally.violations.append(f"{name}: a damaged checkpoint was accepted")
    for template in templates:
        shutil.rmtree(template)
    return tally


def spoil(file: Path, draw: random.Random) -> None:
    """Flip one bit, or cut the file somewhere."""
    content = bytearray(file.read_bytes())
    if content and draw.random() < 0.6:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content) or 1) :]
    file.write_bytes(bytes(content))
