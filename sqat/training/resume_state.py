"""The saved state of an unfinished stage: one safetensors file of tensors, and a JSON file that points to it.

The JSON holds the digest of both. Nothing is unpickled. Rank 0 writes it;
`sqat.training.resume` says what is saved and restored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from sqat.distributed import any_rank, broadcast_from_rank0
from sqat.errors import SqatError
from sqat.files.read import read_bytes, read_json
from sqat.files.replace import UNFINISHED, make_folder, remove_folder, write_synced

OWN_FILE = re.compile(r"(\.?)(state\.json|step-\d+\.safetensors)(\.new)?")
MAX_STATE = 1 << 50  # bytes: a state has no limit of its own, it is as large as the model


@dataclass
class Progress:
    """How far a training is; ``accumulation_steps`` counts the batches of a step on all ranks."""

    step: int = 0
    accumulation_steps: int = 1
    best: float = -math.inf
    evals_without_improvement: int = 0
    seconds: float = 0.0
    samples: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


class ResumeState:
    """The saved state of a stage in a folder of its own, which is removed when the stage ends.

    Args:
        key: of the stage; a state of another key is not used.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.key = directory, key
        self.cached: list[tuple[dict[str, Tensor], Progress] | None] = []

    def part(self, name: str) -> ResumeState:
        """Return the state of a training inside the stage; it goes with the stage's own."""
        return ResumeState(self.directory / name, f"{self.key} {name}")

    @property
    def exists(self) -> bool:
        """Whether a state was saved, of whatever key."""
        return any(path.is_file() for path in self.directory.glob("*"))

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the tensors, then the JSON, each to a new file that is renamed; then remove older tensors.

        Raises:
            SqatError: a file cannot be written; the last state is still whole.
        """
        content = tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name, entries = f"step-{progress.step}.safetensors", vars(progress)
        index = {"key": self.key, "file": name, "sha256": state_digest(content, entries), "progress": entries}
        try:
            make_folder(self.directory)
            for target, data in ((name, content), ("state.json", json.dumps(index).encode())):
                write_synced(self.directory / f".{target}.new", data)
                (self.directory / f".{target}.new").rename(self.directory / target)
            self.remove_files(lambda other: other.startswith("step-") and other != name)
        except OSError as error:
            problem = f"the mid-stage state cannot be written: {error.strerror or error}"
            raise SqatError(problem, "free space", str(self.directory), code="unwritable-file") from error
        finally:
            self.remove_files(lambda other: other.endswith(".new"))

    def remove(self) -> None:
        """Delete the folder; what sqat did not write stays in it."""
        self.remove_files(lambda name: True)
        for folder in [] if self.directory.is_symlink() else self.directory.glob("*/"):
            ResumeState(folder, "").remove()  # of a part of the stage
            remove_folder(folder, UNFINISHED)  # of an export
        with suppress(OSError):  # it is not there, or holds something else
            self.directory.rmdir()

    def remove_files(self, is_chosen: Callable[[str], bool]) -> None:
        """Delete the files of ours that are chosen by name."""
        if self.directory.is_symlink():
            return
        for path in self.directory.glob("*"):
            if OWN_FILE.fullmatch(path.name) and is_chosen(path.name):
                path.unlink(missing_ok=True)

    def peek(self) -> Progress | None:
        """Return the progress of the state that `take` will return; the state is read once and cached."""
        if not self.cached:
            self.cached = [self.load()]
        return None if self.cached[0] is None else self.cached[0][1]

    def take(self) -> tuple[dict[str, Tensor], Progress] | None:
        """Return what `load` returns; every rank must call this.

        Raises:
            SqatError: the ranks do not all see the same state.
        """
        progress = self.peek()
        text = "" if progress is None else json.dumps(asdict(progress))
        if any(any_rank(text != broadcast_from_rank0(text))):
            raise SqatError("not every process finds the same mid-stage state",
                            "put the output where all hosts see it", str(self.directory),
                            code="unreadable-file")  # fmt: skip
        return self.cached.pop()

    def load(self) -> tuple[dict[str, Tensor], Progress] | None:
        """Read the last state; None where there is none, it is of another key, or it is damaged."""
        try:
            root = self.directory.parent
            index = read_json(self.directory / "state.json", root=root)
            if index["key"] != self.key:
                return None
            content = read_bytes(self.directory / Path(index["file"]).name, limit=MAX_STATE, root=root)
            if state_digest(content, index["progress"]) != index["sha256"]:
                return None
            return parse_tensors(content), Progress(**index["progress"])
        except (SqatError, OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def state_digest(content: bytes, progress: Mapping[str, object]) -> str:
    """Return the sha256 of tensors and progress."""
    return hashlib.sha256(content + json.dumps(progress).encode()).hexdigest()
