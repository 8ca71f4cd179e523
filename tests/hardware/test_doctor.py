"""What `sqat doctor` says of machines, of this one and of others, and that its table fits a terminal."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sqat import cli, runtime
from sqat.errors import SqatError
from sqat.hardware import doctor
from sqat.hardware.doctor import OPTIONAL, REQUIRED, diagnose
from sqat.hardware.machine import Gpu, Kernels, Machine, Processor, describe_kernels
from sqat.hardware.targets import BACKENDS, TARGETS, Verdict, check
from sqat.recipe import targets as recipe_targets

ROOT = Path(__file__).parents[2]
PACKAGES = {"torch": "2.9", "onnxruntime": "1.30", "openvino": "2026", "tensorrt": "10.9", "compressed_tensors": "0.12"}
VNNI = Processor("Xeon", "x86_64", 8, frozenset({"avx2", "avx512_vnni"}))
A10, T4 = Gpu("NVIDIA A10", (8, 6)), Gpu("Tesla T4", (7, 5))
SERVER = Machine(VNNI, (A10,), PACKAGES, ("CPUExecutionProvider",), cusparselt=True,
                 kernels=Kernels("avx2", problem=""))  # fmt: skip


def verdicts(machine: Machine) -> list[Verdict]:
    return [check(name, subject, machine) for name, subject in (*BACKENDS.items(), *TARGETS.items())]


def states(machine: Machine) -> dict[str, str]:
    return {verdict.name: verdict.state for verdict in verdicts(machine)}


def test_a_machine_with_everything_lacks_nothing() -> None:
    assert set(states(SERVER).values()) == {"ready"}
    assert not any(verdict.lacks or verdict.install for verdict in verdicts(SERVER))


@pytest.mark.parametrize(("changed", "less"), [
    (replace(SERVER, versions={name: "1" for name in PACKAGES if name != "openvino"}), {"openvino": "no"}),
    (replace(SERVER, versions={name: "1" for name in PACKAGES if name != "onnxruntime"}),
     {"onnxruntime": "no", "onnx-int8": "no", "onnx-fp32": "no"}),
    (replace(SERVER, versions={name: "1" for name in PACKAGES if name != "tensorrt"}),
     {"tensorrt": "no", "onnx-fp16": "no"}),
    (replace(SERVER, versions={name: "1" for name in PACKAGES if name != "compressed_tensors"}),
     {"compressed-tensors": "partly"}),
    (replace(SERVER, cusparselt=False), {"torch-semi-structured": "partly"}),
    (replace(SERVER, gpus=(T4,)), {"tensorrt": "partly", "onnx-fp16": "partly", "torch-semi-structured": "partly"}),
    (replace(SERVER, gpus=()), {"tensorrt": "no", "onnx-fp16": "partly", "torch-semi-structured": "partly"}),
    (replace(SERVER, processor=replace(VNNI, features=frozenset({"avx2"}))),
     {"onnxruntime": "partly", "onnx-int8": "partly", "openvino": "partly"}),
])  # fmt: skip
def test_a_missing_part_changes_only_what_needs_it(changed: Machine, less: dict[str, str]) -> None:
    assert states(changed) == states(SERVER) | less


def test_every_verdict_that_is_not_ready_names_what_it_lacks() -> None:
    bare = Machine(Processor(machine="x86_64"), kernels=Kernels(problem="no compiled runtime", remedy="install g++"))
    for verdict in verdicts(bare):
        assert verdict.state != "ready"
        assert verdict.lacks, verdict


def test_every_target_has_its_needs() -> None:
    assert set(TARGETS) == set(recipe_targets.TARGETS)


def test_its_requirements_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"\ndependencies = \[\n(.*?)\n\]", text, re.DOTALL)
    assert listed is not None
    assert set(REQUIRED) == set(re.findall(r'"([\w-]+)[><=]', listed[1]))
    extras = set(re.findall(r"^([\w-]+) = \[", text, re.MULTILINE))
    assert {extra for extra in OPTIONAL.values() if extra} <= extras
    installs = [verdict.install for verdict in verdicts(Machine())]
    assert set(re.findall(r"sqat\[([\w-]+)\]", " ".join(installs))) <= extras


def test_a_missing_library_comes_with_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "LIBRARY", tmp_path / "none.so")
    kernels = describe_kernels()
    assert (kernels.instruction_set, kernels.remedy) == ("", runtime.install_hint())
    verdict = check("cpu-sparse", TARGETS["cpu-sparse"], replace(SERVER, kernels=kernels))
    assert (verdict.state, verdict.install) == ("no", runtime.install_hint())


def test_a_wrong_instruction_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise SqatError("SQAT_RUNTIME_ISA is mmx", code="usage")

    monkeypatch.setattr(runtime, "instruction_set", refuse)
    assert describe_kernels() == Kernels(problem="SQAT_RUNTIME_ISA is mmx")


def test_an_install_command_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(SERVER, versions={"torch": "2.9", "openvino": "1", "tensorrt": "1", "compressed_tensors": "1"})
    monkeypatch.setattr(doctor, "describe_machine", lambda: lacking)
    assert diagnose().remedies()["pip install onnxruntime"] == ["onnxruntime", "onnx-int8", "onnx-fp32"]


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert doctor.version_of("no-such-distribution") == ""
    assert doctor.version_of("torch") == importlib.metadata.version("torch")


@pytest.mark.parametrize("found", [SERVER, replace(SERVER, gpus=(T4, A10)), Machine()], ids=["gpu", "gpus", "bare"])
def test_its_table_fits_80_columns(
    found: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "describe_machine", lambda: found)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines() if "pip install" not in line) <= 80
    assert "\x1b" not in out
    assert all(f"\n{name} " in out for name in (*BACKENDS, *TARGETS))
    assert ("a GPU with sparse tensor" not in out) == (A10 in found.gpus)


def test_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["versions"]["torch"] == importlib.metadata.version("torch")
    assert [entry["name"] for entry in values["targets"]] == list(TARGETS)
    assert {entry["state"] for entry in values["backends"]} <= {"ready", "partly", "no"}
    assert values["processor"]["cores"] >= 1


def test_it_imports_no_torch() -> None:
    code = "import sys; from sqat import cli; cli.main(['doctor', '--json']); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(done.stderr.split())
    assert not {"transformers", "datasets", "openvino", "onnx"} & loaded
    assert bool(json.loads(done.stdout)["gpus"]) or "torch" not in loaded


def test_bad_flags_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
