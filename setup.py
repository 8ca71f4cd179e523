"""Compiles `sqat/runtime/source` to one plain shared library; everything else about the package is in pyproject.toml.

The library is no Python module: it is named `libsqat_runtime.so`, exports plain C functions, and one build serves every
Python 3. It is optional: without a compiler the package installs all the same, and `sqat.runtime.library` says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path("sqat/runtime/source")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fno-fast-math",  # whatever CXXFLAGS says: reassociated sums are other sums
    "-ffp-contract=off",  # a fused multiply-add rounds once where the others round twice
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-uninitialized",  # gcc 12's own AVX-512 header
    "-g0",
]


class SharedLibrary(build_ext):
    """An extension without Python's names: neither its suffix nor an init function."""

    def get_ext_filename(self, fullname: str) -> str:
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"{name}.so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


LIBRARY = Extension(
    "sqat.runtime.libsqat_runtime",
    sources=sorted(str(path) for path in SOURCE.glob("*.cpp")),
    depends=sorted(str(path) for path in SOURCE.glob("*.h")),
    language="c++",
    extra_compile_args=FLAGS,
    extra_link_args=[f"-Wl,--version-script={SOURCE / 'exports.map'}", "-Wl,-z,defs", "-Wl,-z,nodelete"],
    optional=True,
)

setup(
    ext_modules=[LIBRARY] if sys.platform.startswith("linux") else [],
    cmdclass={"build_ext": SharedLibrary, "bdist_wheel": PlatformWheel},
)
