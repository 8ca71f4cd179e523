"""No command imports what it does not use: the heavy packages that each may import, its commonest mistakes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {source: nowhere/model}
task: classification
data: {train: train.jsonl, dev: train.jsonl}
stages: {train: {epochs: 1}, prune: {}, calibrate: {}, qat: {}, export: {}}
"""
HEAVY = {
    *("torch", "transformers", "accelerate", "datasets", "diffusers", "safetensors", "pandas", "pyarrow"),
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "sklearn", "scipy", "numpy"),
    *("matplotlib", "PIL", "jinja2", "pydantic", "yaml"),
}
TYPER = {"pydantic"}  # with which it reads the arguments of a command
YAML = {*TYPER, "yaml"}
ROWS = {*YAML, "torch", "datasets", "numpy", "pandas", "pyarrow", "safetensors"}
GRAPH = {*TYPER, "numpy", "onnx", "onnx_ir"}
# Command line -> exit code, what it may import of them.
TABLE: dict[str, tuple[int, set[str]]] = {
    "--version": (0, set()),
    "--help": (0, set()),
    "qat --help": (0, TYPER),
    "rum": (2, TYPER),
    "run nowhere.yaml": (2, YAML),
    "run bad.yaml": (2, YAML),
    "run good.yaml --from nowhere": (2, YAML),
    "run good.yaml --dry-run": (0, ROWS),
    "qat good.yaml --from empty": (2, YAML),
    "export good.yaml --target nothing": (2, YAML),
    "evaluate good.yaml nowhere.onnx": (2, TYPER),
    "evaluate good.yaml train.jsonl": (2, TYPER),
    "evaluate bad.yaml empty": (2, YAML),
    "inspect nowhere.onnx": (2, TYPER),
    "inspect empty": (2, TYPER),
    "inspect one.onnx": (0, GRAPH),
    "analyze good.yaml --split test": (2, YAML),
    "engine nowhere.onnx": (2, TYPER),
    "engine one.onnx --backend nothing": (2, GRAPH),
    "bench one.onnx --batch x": (2, {*TYPER, "numpy"}),
    "bench one.onnx --backend nothing": (2, {*TYPER, "numpy", "onnx"}),
    "report empty": (2, TYPER),
    "init train.jsonl --dev nowhere.jsonl": (2, TYPER),
    "init train.jsonl": (0, ROWS),
    "schema": (0, YAML),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes, one with a mistake; rows; a folder that holds nothing; a file of one layer."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "good.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(RECIPE.replace("epochs", "epoch"))
    rows = [json.dumps({"text": f"sentence {number} of many", "label": number % 2}) for number in range(20)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "empty").mkdir()
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "one", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "one.onnx")
    return folder


@pytest.mark.parametrize("line", TABLE)
def test_a_command_imports_what_it_uses(line: str, folder: Path) -> None:
    code, allowed = TABLE[line]
    program = f"import sys, sqat.cli; code = sqat.cli.main({line.split()}); print(); print(code, *sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    ended, *modules = run.stdout.splitlines()[-1].split()
    assert int(ended) == code, run.stderr
    assert HEAVY & set(modules) <= allowed


def test_help_is_quick() -> None:
    """Under 0.5 s on an idle machine; processor time, so that a busy one does not fail it."""
    code = "import resource, sys; from sqat.cli import main; main(['--help']); "
    code += "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(run.stderr) < 0.5
