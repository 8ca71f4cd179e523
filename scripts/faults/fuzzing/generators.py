"""The table of generators: a module with `make_case` for each kind of input, and its share of the inputs.

Kinds that take long have a smaller share. Only the process that tries inputs imports the modules.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from scripts.faults.fuzzing.case import MakeCase


@dataclass(frozen=True)
class Generator:
    """Where `make_case` of a kind stands, and how many of 100 inputs it makes."""

    module: str
    share: int

    def load(self) -> MakeCase:
        """Import the function."""
        make_case: MakeCase = importlib.import_module(f"scripts.faults.fuzzing.{self.module}").make_case
        return make_case


GENERATORS = {
    "recipe": Generator("recipes", 27),
    "manifest": Generator("manifests", 27),
    "data": Generator("data_files", 10),
    "run-folder": Generator("run_folders", 4),
    "onnx": Generator("onnx_files", 12),
    "build-log": Generator("build_logs", 10),
    "source": Generator("source_folders", 10),
}
