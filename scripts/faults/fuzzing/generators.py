"""The table of generators: name -> the function that makes one input."""

from __future__ import annotations

from scripts.faults.fuzzing import build_logs, data_files, manifests, onnx_files, recipes, run_folders, source_folders
from scripts.faults.fuzzing.case import MakeCase

GENERATORS: dict[str, MakeCase] = {
    "recipe": recipes.make_case,
    "manifest": manifests.make_case,
    "data": data_files.make_case,
    "run-folder": run_folders.make_case,
    "onnx": onnx_files.make_case,
    "build-log": build_logs.make_case,
    "source": source_folders.make_case,
}
