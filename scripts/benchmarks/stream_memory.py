"""Peak memory of a streamed train split, by its number of rows.

    python -m scripts.benchmarks.stream_memory --rows 1000000 10000000 --json stream.json

For each size it writes a data set in Parquet shards, reads it in one process (window by window, then anew from the
middle of an epoch), runs `sqat run` on it with a tiny BERT, and removes it. Memory is the kernel's VmHWM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"w{number}" for number in range(5000)]
SHARD, GROUP = 250_000, 10_000  # rows of a file, and of a row group in it
BATCH, LENGTH = 32, 32
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]  # of the tokenizer
RECIPE = f"""model: {{source: model, max_length: {LENGTH}}}
task: {{name: classification, labels: [bad, good]}}
output: runs
data:
  train: {{path: "part-*.parquet", streaming: true}}
  dev: {{path: part-00000.parquet, limit: 64}}
stages:
  train: {{steps: 20, batch_size: {BATCH}}}
  prune: {{steps: 10, batch_size: {BATCH}}}
  calibrate: {{samples: 64}}
  qat: {{steps: 10, batch_size: {BATCH}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--windows", type=int, default=20, help="windows of 16,384 rows that are read of each")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        print(json.dumps(read(given.inside, given.windows)))
        return
    figures = [measure(rows, given.windows) for rows in given.rows]
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(rows: int, windows: int) -> dict[str, float]:
    """Figures of one size."""
    with tempfile.TemporaryDirectory() as folder:
        generate(rows, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.parquet")) / 1e6
        command = [sys.executable, __file__, "--inside", folder, "--windows", str(windows)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        whole = run(Path(folder))
    figures = {"rows": rows, "disk_mb": round(size, 1), **json.loads(output.splitlines()[-1]), **whole}
    print(figures, flush=True)
    return figures


def generate(rows: int, folder: Path) -> None:
    """Write the shards; the same rows for the same numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    words, classes = pa.array(WORDS), pa.array(["bad", "good"])
    for start in range(0, rows, SHARD):
        random, count = np.random.default_rng(start), min(SHARD, rows - start)
        drawn = [words.take(pa.array(random.integers(0, len(WORDS), count))) for _ in range(10)]
        label = classes.take(pa.array(random.integers(0, 2, count)))
        table = pa.table({"text": pc.binary_join_element_wise(*drawn, " "), "label": label})
        pq.write_table(table, folder / f"part-{start // SHARD:05d}.parquet", row_group_size=GROUP)


def run(folder: Path) -> dict[str, float]:
    """Seconds and most memory in MB of `sqat run` on a data set, from start to end.

    Raises:
        RuntimeError: the command ends otherwise than with code 0.
    """
    (folder / "stream.yaml").write_text(RECIPE, encoding="utf-8")
    begun = time.monotonic()
    command = [sys.executable, "-m", "sqat", "run", "stream.yaml", "--quiet", "--no-rehearsal"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"sqat run ended with code {process.returncode}")
    return {"run_mb": round(used.ru_maxrss / 1024, 2), "run_s": round(time.monotonic() - begun, 2)}


def read(folder: Path, windows: int) -> dict[str, float]:
    """What one process sees of a data set: memory in MB, times in seconds."""
    import transformers

    from sqat.data.streaming import StreamedBatches
    from sqat.data.tokens import TextProcessor
    from sqat.recipe.inputs import Columns, SplitConfig
    from sqat.recipe.tasks import ClassificationTask
    from sqat.tasks.classification import Classification
    from sqat.tasks.splits import open_stream

    words = {name: number for number, name in enumerate(NAMES)}
    tokenizer: Any = transformers.BertTokenizerFast(vocab=words)  # type: ignore[attr-defined]
    processor = TextProcessor(tokenizer)
    task, config = Classification(("bad", "good")), ClassificationTask(labels=("bad", "good"))
    split = SplitConfig(path="*.parquet", streaming=True)

    def opened() -> StreamedBatches:
        return StreamedBatches(open_stream(split, Columns(), config, folder, 0), BATCH, task.encode)

    def batch(batches: StreamedBatches, numbers: list[int]) -> None:
        rows = processor.prepare(batches.pick(numbers), LENGTH)
        processor.collate(rows, list(range(len(rows))))

    begun, imports = time.monotonic(), peak()
    batches, epoch, done = opened(), 0, 0
    opening = time.monotonic() - begun
    begun = time.monotonic()
    while done < windows * split.buffer:
        for number, numbers in enumerate(batches.plan(epoch)):
            if number % 64 == 0:
                batch(batches, numbers)
            done += len(numbers)
            if done >= windows * split.buffer:
                break
        epoch += 1
    reading = time.monotonic() - begun
    begun = time.monotonic()
    again = opened()
    plan = again.plan(epoch)
    batch(again, plan[len(plan) // 2 :][0])
    figures = {"imports_mb": imports, "peak_mb": peak(), "rows_read": done, "open_s": opening, "read_s": reading,
               "middle_s": time.monotonic() - begun}  # fmt: skip
    write_model(tokenizer, folder / "model")
    return {name: round(value, 2) for name, value in figures.items()}


def write_model(tokenizer: Any, folder: Path) -> None:
    """A tiny BERT, for the whole command to start from."""
    from transformers import BertConfig, BertModel

    shape: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(NAMES), **shape)).save_pretrained(folder)


def peak() -> float:
    """Most memory this process ever had resident, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
