"""What the fault harness counts: faults that came in time, and how each run ended."""

from __future__ import annotations

from scripts.faults.moments import STOPPED
from scripts.faults.project import Ended
from scripts.faults.tally import Tally


def test_a_run_that_was_over_is_no_fault_and_a_saved_state_is_reported_from_an_interruption() -> None:
    tally = Tally("signals", "one at a random moment")
    for code, said in (
        (0, ""),
        (130, "train: stopped and saved at step 3 of 20; run the same command without --force to resume\n"),
        (130, "interrupted; run the same command again to resume from the last saved state\n"),
        (1, "internal error: KeyError\n"),
    ):
        tally.note(Ended(code, said, 1.0), "train", STOPPED)
    assert tally.ends == {
        "finished before": 1, "stopped and saved": 1, "interrupted where nothing trains": 1, "exit code 1": 1,
    }  # fmt: skip
    assert (tally.done, tally.stages) == (3, {"train": 3})
    assert tally.violations == ["train: exit code 1: internal error: KeyError\n"]
