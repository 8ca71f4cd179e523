"""Run an ablation recipe over seeds and print its closing tables as one: mean and standard deviation over the seeds.

    python scripts/ablation.py recipes/ablation.yaml --seeds 0 1 2 --processes 2 [--json FILE]

Each seed is a run of its own (``--set seed=N name=RECIPE-seedN``), so stages that are done already are skipped. With
several processes each gets its share of the cores: two runs of one thread each finish sooner than one of two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, float]]


def run_seed(recipe: Path, seed: int, threads: int) -> dict[str, Any]:
    """Run one seed and return its closing table as `sqat run --json` prints it."""
    command = [sys.executable, "-m", "sqat", "run", str(recipe), "--json", "--quiet"]
    command += ["--set", f"seed={seed}", "--set", f"name={recipe.stem}-seed{seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    table: dict[str, Any] = json.loads(done.stdout)
    return table


def summarise(tables: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Label -> metric -> mean and standard deviation over the seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for table in tables:
        for row in table["rows"]:
            for metric, value in row["metrics"].items():
                rows.setdefault(row["label"], {}).setdefault(metric, []).append(float(value))
    return {
        label: {metric: (statistics.mean(values), statistics.stdev(values)) for metric, values in metrics.items()}
        for label, metrics in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every seed's table here")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    with ThreadPoolExecutor(arguments.processes) as pool:
        tables = list(pool.map(lambda seed: run_seed(arguments.recipe, seed, threads), arguments.seeds))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(dict(zip(map(str, arguments.seeds), tables, strict=True)), indent=2) + "\n"
        )
    summary = summarise(tables)
    metrics = list(next(iter(summary.values())))
    print(f"| {len(tables)} seeds, {tables[0]['split']} | " + " | ".join(metrics) + " |")
    print("|---" * (len(metrics) + 1) + "|")
    for label, row in summary.items():
        print(f"| {label} | " + " | ".join(f"{row[m][0]:.3f} ± {row[m][1]:.3f}" for m in metrics) + " |")


if __name__ == "__main__":
    main()
