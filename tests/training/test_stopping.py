"""Signals while a model trains: the first is noted, the second interrupts, and nothing of the training is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.distributed import any_rank
from sqat.errors import StoppedError
from sqat.progress import SilentReporter
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches
from sqat.training.loop import fit
from sqat.training.resume import Evaluation
from sqat.training.resume_state import ResumeState
from sqat.training.signals import catch_stop_signals

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """No signal of these tests may end the process that runs all others: what nobody handles is ignored here."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with catch_stop_signals() as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL, "the third one kills"
    assert signal.getsignal(number) == before


def test_another_thread_gets_no_signals() -> None:
    answers: list[bool] = []

    def look() -> None:
        with catch_stop_signals() as asked:
            answers.append(asked())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert answers == [False]


def test_one_process_asks_nobody() -> None:
    assert any_rank(True, False) == [True, False]


class Signalled(SilentReporter):
    """Gets a signal while a step is shown."""

    def __init__(self, at: int) -> None:
        self.at = at

    def advance(self, step: int, values: Any, rate: float) -> None:
        if step == self.at:
            signal.raise_signal(signal.SIGTERM)


def train(state: Path, at: int, evaluation: Evaluation | None = None, **config: Any) -> list[Tensor]:
    """Weights of a small net after eight steps, during one of which a signal comes."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1)), torch.randn(16, 4)
    batches = Batches(
        lambda epoch: [list(range(i, i + 4)) for i in range(0, 16, 4)],
        lambda rows: Batch({"x": x[rows]}, x[rows].sum(1), torch.full((len(rows),), -1)),
    )

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"square": (model(batch.inputs["x"]).squeeze(1) - batch.labels).square().mean()}

    known = TrainConfig(**{"learning_rate": 0.1, "save_every": 1e9, **config})
    fit(
        net,
        loss,
        batches,
        known,
        steps=8,
        seed=1,
        title="net",
        reporter=Signalled(at),
        state=ResumeState(state, "key"),
        evaluation=evaluation,
    )
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_signal_saves_at_the_step_and_the_fit_goes_on_to_the_same_weights(tmp_path: Path, at: int) -> None:
    unbroken = train(tmp_path / "unbroken", 0)
    with pytest.raises(StoppedError) as caught:
        train(tmp_path / "state", at)
    assert caught.value.exit_code == 130
    line = f"net: stopped and saved at step {at} of 8; run the same command without --force to resume"
    assert str(caught.value) == line
    loaded = ResumeState(tmp_path / "state", "key").load()
    assert loaded is not None
    assert loaded[1].step == at
    resumed = train(tmp_path / "state", 0)
    assert all(torch.equal(a, b) for a, b in zip(resumed, unbroken, strict=True))


def test_a_signal_during_the_last_save_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without gain end the loop right after the save that the signal interrupts."""
    saved, save = list[int](), ResumeState.save

    def interrupted(self: ResumeState, tensors: Any, progress: Any) -> None:
        save(self, tensors, progress)
        saved.append(progress.step)
        if saved == [1, 2]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ResumeState, "save", interrupted)
    nothing_gained = Evaluation(lambda: {"score": 1.0}, "score")
    with pytest.raises(StoppedError, match="net: stopped and saved at step 2 of 8"):
        train(tmp_path / "state", 0, nothing_gained, save_every=0, evaluate_every=1, early_stopping=1)
    assert saved == [1, 2, 2]


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["ROOT"])
from tests.training import test_stopping
from sqat.errors import StoppedError
from sqat.training.resume_state import ResumeState
save = ResumeState.save
ResumeState.save = lambda *known: (time.sleep(1), save(*known))
try:
    test_stopping.train(Path(sys.argv[1]), 3 if os.environ["RANK"] == "1" else 0)
except StoppedError as error:
    print(error, ResumeState(Path(sys.argv[1]), "key").load() is not None)
    sys.exit(error.exit_code)
"""


def test_all_processes_stop_at_the_step_at_which_one_was_told(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {**os.environ, "ROOT": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "state")], text=True, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**known, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]  # fmt: skip
    ends = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [130, 130], ends
    assert [out.partition(";")[0] for out, _ in ends] == ["net: stopped and saved at step 3 of 8"] * 2
    assert all(out.endswith("to resume True\n") for out, _ in ends), "no process ends before the state is whole"
    loaded = ResumeState(tmp_path / "state", "key").load()
    assert loaded is not None
    assert loaded[1].step == 3
