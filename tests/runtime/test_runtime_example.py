"""The C example compiles against ONNX Runtime's headers, where there are any: its wheel has none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sqat import runtime

EXAMPLE = Path(runtime.__file__).with_name("source") / "example.c"
PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include")


def headers() -> Path | None:
    """The folder of onnxruntime_c_api.h: ``ONNXRUNTIME_INCLUDE``, or where systems put it."""
    places = [Path(place) for place in (os.environ.get("ONNXRUNTIME_INCLUDE"), *PLACES) if place]
    return next((place for place in places if (place / "onnxruntime_c_api.h").is_file()), None)


def test_the_example_compiles() -> None:
    compiler, folder = shutil.which("gcc"), headers()
    if compiler is None or folder is None:
        pytest.skip("no gcc or no headers of ONNX Runtime (ONNXRUNTIME_INCLUDE)")
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{folder}", str(EXAMPLE)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
