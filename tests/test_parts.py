"""A new part is one file and one line in the table of its room: a recipe, the schema and `sqat.api` know it then.

CONTRIBUTING quotes this test as its worked example.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sqat.checkpoint.store import load_checkpoint

ROOT = Path(__file__).parents[1]

# sqat/quantization/calibrators/half_maximum.py
CALIBRATOR = '''
"""Half of the maximum: for data whose largest values do not matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator

if TYPE_CHECKING:
    from sqat.quantization.histogram import Histogram


@dataclass(frozen=True)
class HalfMaximum(Calibrator):
    """The largest |x| times a factor.

    Attributes:
        factor: at most 1.
    """

    name: Literal["half-max"] = "half-max"
    factor: float = 0.5

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the scaled maximum."""
        return self.factor * histogram.max_abs
'''

# sqat/sparsity/criteria/input_norm.py
CRITERION = '''
"""Input norm: the weights of the smallest inputs go, whatever the weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sqat.sparsity.criteria.criterion import Criterion, Statistic, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InputNorm(Criterion):
    """The norm of a weight's input."""

    name: Literal["input-norm"] = "input-norm"
    samples: int = 8
    statistics: ClassVar[Statistic] = "input_squares"

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return the norms, the same in each row."""
        return require(statistics).sqrt().expand_as(weight)
'''

# sqat/export/targets/onnx_folded.py
TARGET = '''
"""Target `onnx-folded`: the float graph, with the attention scale folded into the query."""

from __future__ import annotations

from pathlib import Path

from sqat.export.card import ONNX_USAGE as USAGE
from sqat.export.folding import fold_attention_scale
from sqat.export.source import Source, TargetFile, write_graph


def write(source: Source, path: Path) -> TargetFile:
    """Write the ONNX file."""
    return write_graph(source, path, fold_attention_scale(source.graph), source.float_checkpoint, "onnx-fp32")
'''

# The line that each table gets, then the command line of `sqat`.
PROGRAM = """
import sys

import made_up.half_maximum, made_up.input_norm
import sqat.quantization.calibrators, sqat.recipe.targets, sqat.sparsity.criteria

sqat.quantization.calibrators.CALIBRATORS += (made_up.half_maximum.HalfMaximum,)
sqat.sparsity.criteria.CRITERIA += (made_up.input_norm.InputNorm,)
sqat.recipe.targets.TARGETS["onnx-folded"] = sqat.recipe.targets.Target("model.folded.onnx", "made_up.onnx_folded")

from sqat.cli import main

sys.exit(main(sys.argv[1:]))
"""


def test_a_recipe_runs_with_parts_that_sqat_does_not_have(
    make_source: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    package = tmp_path / "made_up"
    package.mkdir()
    files = {"half_maximum": CALIBRATOR, "input_norm": CRITERION, "onnx_folded": TARGET, "__init__": ""}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "program.py").write_text(PROGRAM)
    one_shot = {"name": "per-group", "num_masks": 1}
    stages = {
        "prune": {"steps": 1, "batch_size": 8, "criterion": "input-norm", "schedule": one_shot},
        "calibrate": {"samples": 16, "batch_size": 8, "method": {"name": "half-max", "factor": 0.25}},
        "export": {"targets": ["onnx-folded"]},
    }
    recipe = write_recipe(make_source(), stages)

    def sqat(*arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        command = [sys.executable, tmp_path / "program.py", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    assert "half-max" in sqat("schema")
    sqat("run", recipe, "--no-rehearsal")
    runs = sorted((tmp_path / "runs" / "tiny").glob("*/sqat.json"))
    manifests = [json.loads(path.read_text()) for path in runs]
    assert [manifest["stage"] for manifest in manifests] == ["prune", "calibrate", "export"]
    for mask in load_checkpoint(runs[0].parent).masks.values():
        assert torch.equal(mask, mask[:1].expand_as(mask)), "all rows have the same inputs"
    card = (runs[2].parent / "README.md").read_text()
    assert "| onnx-folded | model.folded.onnx |" in card
    assert 'InferenceSession("model.folded.onnx")' in card
    assert all(site["saturated"] > 0 for site in manifests[1]["sites"].values()), "a quarter of the maximum clips"
