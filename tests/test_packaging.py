"""The source archive and the wheel made from it: what they hold, and that a clean folder of them runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
WITHOUT_COMPILER = {"CC": "false", "CXX": "false"}  # the library is built by tests/runtime; here it would take minutes


def build(kind: str, source: Path, output: Path) -> Path:
    """The archive that the build backend makes of a folder."""
    done = subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", str(output)], cwd=source, text=True,
                          capture_output=True, env={**os.environ, **WITHOUT_COMPILER}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, and that from a copy of what git knows of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    listed = subprocess.run(["git", "ls-files", "-z", "sqat", "*.toml", "*.py", "README.md", "LICENSE"], cwd=ROOT,
                            capture_output=True, text=True, check=False)  # fmt: skip
    if listed.returncode:
        pytest.skip("no git repository here")
    for name in filter(None, listed.stdout.split("\0")):
        copy = folder / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            copy.write_bytes((ROOT / name).read_bytes())
    careful: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4
    with tarfile.open(build("sdist", folder / "clone", folder)) as archive:
        archive.extractall(folder / "unpacked", **careful)
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder)


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    kept = {"sqat/py.typed", "sqat/report/page.html"}
    kept |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "sqat").rglob("*.py")}
    kept |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "sqat/runtime/source").iterdir() if path.is_file()}
    names = names_of(wheel)
    assert kept - names == set()
    others = {name for name in names if not name.startswith("sqat/")}
    assert {name.partition("/")[0].rpartition(".")[2] for name in others} == {"dist-info"}, "no tests, no scripts"
    assert any(name.endswith("licenses/LICENSE") for name in others)


def test_the_metadata_say_what_pyproject_does(wheel: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("dist-info/METADATA"))
        found = HeaderParser().parsestr(archive.read(name).decode())
        entries = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert (found["Name"], found["License-Expression"]) == ("sqat", "Apache-2.0")
    assert found["Description-Content-Type"] == "text/markdown"
    assert "scripts/quickstart" in found.get_payload()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["Version"])
    assert set(found.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    required = found.get_all("Requires-Dist")
    assert len(required) == len(project["dependencies"]) + sum(map(len, project["optional-dependencies"].values()))
    assert "sqat = sqat.cli:main" in entries


def test_it_runs_from_a_clean_folder(wheel: Path, tmp_path: Path) -> None:
    """Nothing of the repository is in reach: an isolated Python whose one more folder is the unpacked wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['sqat', *sys.argv[1:]]; "
    start += "import sqat; assert sqat.__file__.startswith(sys.path[0]), sqat.__file__; "
    start += "runpy.run_module('sqat', run_name='__main__')"
    for words, told in ((["--help"], "Usage"), (["schema"], '"$defs"')):
        done = subprocess.run([sys.executable, "-I", "-c", start, *words], cwd=tmp_path, text=True, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert told in done.stdout
