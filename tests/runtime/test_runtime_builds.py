"""Other builds of the same sources: the VNNI tiles over emulated instructions, and everything under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from sqat import runtime
from tests.runtime.kernel_oracle import SIZES, check
from tests.runtime.nodes import Node, available, needs_library, random_linear
from tests.runtime.test_runtime_attention import node as attention_node
from tests.runtime.test_runtime_attention import random_text

ROOT = Path(__file__).parents[2]
SOURCE = Path(runtime.__file__).with_name("source")
COMPILER = shutil.which("g++")
FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-uninitialized",
]

pytestmark = [needs_library, pytest.mark.skipif(COMPILER is None, reason="no g++")]


def compile_library(folder: Path, *flags: str) -> Path:
    """The library of all sources with other flags."""

    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        subprocess.run([str(COMPILER), *FLAGS, *flags, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCE.glob("*.cpp"))))
    library = folder / "libsqat_runtime.so"
    subprocess.run([str(COMPILER), "-shared", *flags, *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("emulated"), "-O0", "-DSQAT_EMULATE_VNNI")


def same(node: Node, emulated: Path, sparse: str = "1") -> None:
    for got, want in zip(node.run("avx512_vnni", library=emulated, sparse=sparse), node.run("scalar"), strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("channels", [16, 32, 33, 80, 100])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (11, 40), (12, 64), (13, 72), (50, 200), (130, 96)])
def test_vnni_tiles_give_the_same_bits(rows: int, inputs: int, channels: int, sparse: bool, emulated: Path) -> None:
    linear = random_linear(rows, (rows, inputs), channels, sparse, norm=rows % 2 == 0, activation="gelu", y_scale=0.05)
    same(linear.node(), emulated)


def test_vnni_expands_weights(emulated: Path) -> None:
    same(random_linear(8, (20, 88), 50).node(), emulated, sparse="0")


@pytest.mark.parametrize("width", [16, 24, 32, 64])
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_vnni_attention_gives_the_same_bits(tokens: int, width: int, emulated: Path) -> None:
    same(attention_node(*random_text(tokens, 2, tokens, 2, width, 0.7), 2), emulated)


def test_emulated_kernels_agree_with_numpy(emulated: Path) -> None:
    with patch.dict(os.environ, {"SQAT_RUNTIME_ISA": "avx512_vnni"}):
        assert check(emulated) == len(SIZES)


def sanitizer_runtimes() -> str:
    """Paths to preload: Python itself is built without sanitizers. Empty where gcc has none."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        run = subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if not Path(run.stdout.strip()).is_absolute():
            return ""
        found.append(str(Path(run.stdout.strip()).resolve()))
    return " ".join(found)


@pytest.mark.slow
def test_kernels_and_fuzz_under_sanitizers(tmp_path: Path) -> None:
    preload = sanitizer_runtimes() if COMPILER else ""
    if not preload:
        pytest.skip("gcc has no sanitizers here")
    flags = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr")
    library = compile_library(tmp_path, *flags)
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}

    def output_of(*words: str) -> str:
        command = [sys.executable, "-m", *words]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    for name in available():
        environment["SQAT_RUNTIME_ISA"] = name
        assert output_of("tests.runtime.kernel_oracle", str(library)) == f"{len(SIZES)} sizes\n"
    del environment["SQAT_RUNTIME_ISA"]
    answer = output_of("tests.runtime.fuzz", str(library), "--rounds", "300")
    match = re.fullmatch(r"300 rounds: (\d+) answers, (\d+) refusals\n", answer)
    assert match is not None, answer
    answers, refusals = map(int, match.groups())
    assert answers + refusals == 300
    assert answers > 300 / 5
    assert refusals > 300 / 10, "little was damaged"


def test_fuzz_of_what_does_not_load_fails(tmp_path: Path) -> None:
    library = tmp_path / "libsqat_runtime.so"
    library.write_bytes(b"no library")
    run = subprocess.run(
        [sys.executable, "-m", "tests.runtime.fuzz", str(library), "--rounds", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "cannot be loaded" in run.stderr
