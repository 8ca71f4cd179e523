"""Build an engine with sparse kernels from an ONNX file. Read this script and change it.

    python build_engine.py [MODEL.onnx] [--backend tensorrt|tensorrt-rtx]
    pip install tensorrt             # 8.6 to 11: run the script on the GPU that will serve the engine
    pip install tensorrt-rtx-cu13    # builds without a GPU, chooses kernels when the engine first runs on one

It writes the engine, the build log and, with TensorRT, the layer information. ``sqat engine MODEL.onnx --log LOG
--layers JSON`` reads them and says which layers run sparse.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

SETTINGS = "build_engine.json"  # beside this script; `sqat export` writes it
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LETTERS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}
FOLLOW_UPS = ("catchCudaError", "Invalid Node - ")


class BuildError(Exception):
    """Why no engine was built, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = read_options(arguments)
        library = import_library(options.backend)
        with options.log.open("w", encoding="utf-8") as log:
            engine = build(library, options.model, json.loads(options.shapes), options.precisions, log)
        write(options.output, bytes(engine))
        if library.__name__ == "tensorrt":
            write(options.layers, layer_information(library, engine).encode())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}, log in {options.log}")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the settings file gives what it leaves out, and files lie beside the model."""
    settings = read_settings(Path(__file__).with_name(SETTINGS))
    precisions = ["INT8", "FP16"] if settings.get("precision") == "fp16" else ["INT8"]
    parser = argparse.ArgumentParser(description="Build a TensorRT engine with sparse kernels from an ONNX file.")
    parser.add_argument("model", nargs="?", type=Path, help=f"default: the one that {SETTINGS} names")
    parser.add_argument("--backend", choices=["auto", *MODULES], default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--layers", type=Path, help="where TensorRT's layer information goes")
    parser.add_argument(
        "--shapes",
        default=json.dumps(settings.get("inputs", {})),
        help="JSON: of each input with free sizes, the smallest, usual and largest shape",
    )
    parser.add_argument("--precisions", nargs="*", default=precisions, help="for TensorRT 8, whose files hold no types")
    options = parser.parse_args(arguments)
    if options.model is None and "file" not in settings:
        parser.error(f"name a model: there is no {SETTINGS} beside this script")
    options.model = options.model or Path(__file__).with_name(settings["file"])
    options.output = options.output or options.model.with_suffix(".engine")
    options.log = options.log or options.model.with_suffix(".build.log")
    options.layers = options.layers or options.model.with_suffix(".layers.json")
    return options


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BuildError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise BuildError(f"{path} holds no object")
    return settings


def import_library(backend: str) -> ModuleType:
    """Import a backend; ``auto`` is TensorRT if it is installed, else TensorRT-RTX."""
    names = list(MODULES) if backend == "auto" else [backend]
    module = next((MODULES[name] for name in names if is_installed(MODULES[name])), None)
    if module is None:
        raise BuildError(f"{' and '.join(names)} not installed; the head of this file says how")
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise BuildError(f"{module} cannot be imported: {error}") from error
    if not hasattr(library, "Builder") or not hasattr(library, "OnnxParser"):
        raise BuildError(f"the module {module} is not NVIDIA's: {getattr(library, '__file__', module)}")
    return library


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of that name, which has no origin, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def build(
    library: ModuleType, model: Path, shapes: dict[str, list[list[int]]], precisions: Sequence[str], file: TextIO
) -> Any:
    """Build and serialize an engine; write the library's messages to ``file``."""
    log = open_log(library, file)
    log.log(library.ILogger.INFO, f"{library.__name__} {library.__version__}, sparse weights allowed")
    builder = library.Builder(log)
    network, typed = new_network(library, builder)
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)) or network.num_outputs == 0:
        raise BuildError(f"the ONNX parser refuses the model: {parser_problem(parser)}")
    config = builder.create_builder_config()
    config.set_flag(library.BuilderFlag.SPARSE_WEIGHTS)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    for name in () if typed else precisions:
        config.set_flag(library.BuilderFlag.__members__[name])
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if log.shape_errors:
        raise BuildError(f"the shapes do not fit the model: {first_sentence(log.shape_errors[0])}")
    if engine is None:
        raise BuildError(
            first_sentence(log.errors[0]) if log.errors else "the library does not say why it built nothing"
        )
    return engine


def open_log(library: ModuleType, file: TextIO) -> Any:
    """Open a logger that writes lines as trtexec does and keeps the errors."""
    # A build that succeeds may log errors: a kernel that needs too much memory is one. Shapes that contradict each
    # other are only a warning, but the engine would fail later.

    class Log(library.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.shape_errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            file.write(f"[{LETTERS[severity.name]}] [TRT] {text}\n")
            if severity.name in ("ERROR", "INTERNAL_ERROR") and FOLLOW_UPS[0] not in text:
                self.errors.append(text)
            if "values are not self-consistent" in text:
                self.shape_errors.append(text)

    return Log()


def new_network(library: ModuleType, builder: Any) -> tuple[Any, bool]:
    """Create an empty network; return it, and whether it is strongly typed (TensorRT 9 and later)."""
    flags = library.NetworkDefinitionCreationFlag.__members__
    numbers = [int(flags[name]) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if name in flags]
    return builder.create_network(sum(1 << number for number in numbers)), "STRONGLY_TYPED" in flags


def parser_problem(parser: Any) -> str:
    """Describe the parser's first error and its node."""
    if parser.num_errors == 0:
        return "no ONNX graph in it"
    error = parser.get_error(0)
    if not hasattr(error, "node_name"):  # before TensorRT 10
        return f"node {error.node()}: {first_sentence(error.desc())}"
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {first_sentence(error.desc())}"


def first_sentence(text: str) -> str:
    """Cut the library's source lines and error codes from a message."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip("[").startswith(FOLLOW_UPS)]
    line = re.sub(r"^.*?Error Code \d+: [^(]*\(", "", (lines or [text])[0])
    return re.sub(r"\.?\s+In \S+ at /.*$", "", line).strip()


def layer_information(library: ModuleType, engine: Any) -> str:
    """Read TensorRT's description of each engine layer as JSON; this needs the GPU."""
    loaded = library.Runtime(library.Logger(library.Logger.ERROR)).deserialize_cuda_engine(engine)
    if loaded is None:
        raise BuildError("the engine was built but cannot be loaded again; see the messages above")
    text: str = loaded.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
    return text


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
