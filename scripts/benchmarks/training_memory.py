"""The peak memory of training and calibration, each in a process of its own. Linux only.

A process reports its peak resident memory minus what was resident after the imports. The malloc settings of
`scripts/benchmarks/training` are removed there: they keep freed memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

FEW, MANY = 4, 32  # batches of calibration
STEPS = 3

Entry = tuple[str, float, float, str, str]  # name, megabytes, those of what it is against, its name, the goal


def memory_rows(source: str, shape: tuple[int, int]) -> Iterator[Entry]:
    """Name, megabytes, megabytes to compare to, their name and the goal."""
    dense, qat = "dense training and the teacher, memory", "QAT with MiniLM v2, memory"
    peaks = {name: peak_of(name, source, shape) for name in (dense, qat)}
    yield dense, peaks[dense], peaks[dense], dense, ""
    yield qat, peaks[qat], peaks[dense], dense, "1.25"
    few, many = (f"calibration of {count} batches, memory" for count in (FEW, MANY))
    peaks = {name: peak_of(name, source, shape) for name in (few, many)}
    yield few, peaks[few], peaks[few], few, ""
    yield many, peaks[many], peaks[few], few, "flat"


def peak_of(name: str, source: str, shape: tuple[int, int]) -> float:
    """Megabytes of a run of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    words = [sys.executable, __file__, json.dumps([name, source, shape])]
    run = subprocess.run(words, env=kept, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def resident(key: str) -> float:
    """Megabytes now (VmRSS) or at most until now (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def run(name: str, source: str, shape: tuple[int, int]) -> None:
    """Run a candidate by its name and print its peak memory."""
    from scripts.benchmarks import training_steps as steps
    from sqat.api.quantize import calibrate
    from sqat.compress.training_losses import task_loss

    torch.set_num_threads(1)
    before = resident("VmRSS")
    model = steps.load_model(source)
    batch = steps.random_batch(model, shape)
    if name.startswith("calibration"):
        calibrate(model, (batch.inputs for _ in range(int(name.split()[2]))))
    else:
        teacher = steps.load_model(source)
        if name.startswith("QAT"):
            masks, scales = steps.masks_of(model), calibrate(model, [batch.inputs])
            step = steps.distilled_step(steps.quantize_(model, scales, masks), teacher, batch)
        else:
            with torch.no_grad():
                teacher.eval()(**batch.inputs)  # its file is mapped: what nobody has read takes no memory
            step = steps.Step(model, task_loss(steps.TASK), batch)
        for _ in range(STEPS):
            step()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    name, source, shape = json.loads(sys.argv[1])
    run(name, source, tuple(shape))
