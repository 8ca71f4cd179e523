"""What an unfinished stage leaves on disk to go on from: safetensors and JSON, written beside and renamed.

The JSON points to the tensors and holds the digest of both; nothing is unpickled. The first process writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from sqat.checkpoint.atomic_write import write_synced
from sqat.distributed import any_rank, broadcast_from_rank0
from sqat.errors import SqatError


@dataclass
class Progress:
    """What a mid-stage state remembers beside tensors; ``accumulation_steps`` is how many batches a step sums up."""

    step: int = 0
    accumulation_steps: int = 1
    best: float = -math.inf
    evals_without_improvement: int = 0
    seconds: float = 0.0
    samples: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


class ResumeState:
    """The mid-stage state on disk: one safetensors file of tensors, one JSON that points to it.

    Args:
        directory: of its own, removed when the stage ends.
        key: of the stage; a state of another key is not used.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.key = directory, key
        self.found: list[tuple[dict[str, Tensor], Progress] | None] = []

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the tensors, then the JSON, each beside and renamed; then drop older tensors.

        Raises:
            SqatError: the disk is full or the like; the last state is still whole.
        """
        content = tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name, known = f"step-{progress.step}.safetensors", vars(progress)
        index = {"key": self.key, "file": name, "sha256": state_digest(content, known), "progress": known}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for target, data in ((name, content), ("state.json", json.dumps(index).encode())):
                write_synced(self.directory / f".{target}.new", data)
                (self.directory / f".{target}.new").rename(self.directory / target)
            for old in self.directory.glob("step-*.safetensors"):
                if old.name != name:
                    old.unlink()
        except OSError as error:
            raise SqatError(f"the mid-stage state cannot be written: {error.strerror or error}", "free space",
                            str(self.directory)) from error  # fmt: skip
        finally:
            for half in self.directory.glob(".*.new"):
                half.unlink(missing_ok=True)

    def peek(self) -> Progress | None:
        """What the state remembers that a fit will go on from; it is read once, and kept until it is taken."""
        if not self.found:
            self.found = [self.load()]
        return None if self.found[0] is None else self.found[0][1]

    def take(self) -> tuple[dict[str, Tensor], Progress] | None:
        """What `load` gives, or gave to `peek`.

        Raises:
            SqatError: the processes of this run do not all find the same.
        """
        known = self.peek()
        told = "" if known is None else json.dumps(asdict(known))
        if any(any_rank(told != broadcast_from_rank0(told))):
            raise SqatError("not every process finds the same mid-stage state",
                            "put the output where all hosts see it", str(self.directory))  # fmt: skip
        return self.found.pop()

    def load(self) -> tuple[dict[str, Tensor], Progress] | None:
        """The last state; None if there is none, it is of another key, or it is damaged."""
        try:
            index = json.loads((self.directory / "state.json").read_bytes())
            if index["key"] != self.key:
                return None
            content = (self.directory / Path(index["file"]).name).read_bytes()
            if state_digest(content, index["progress"]) != index["sha256"]:
                return None
            return parse_tensors(content), Progress(**index["progress"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def state_digest(content: bytes, progress: Mapping[str, object]) -> str:
    """sha256 of a mid-stage state: its tensors and what it remembers beside them."""
    return hashlib.sha256(content + json.dumps(progress).encode()).hexdigest()
