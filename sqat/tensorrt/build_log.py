"""Read what a build log or a layer-information file says of an engine, whichever TensorRT wrote it.

It reads the ``(Sparsity)`` lines in both their forms (TensorRT 8; 10 to 11), the weight bytes, and the engine's
layers: from JSON, or from the ``Layers:`` part of a verbose log. Lines may have any prefix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sqat.errors import SqatError
from sqat.files.read import MEGABYTE, parse_json, read_bytes

LARGEST_LOG = 512 * MEGABYTE

ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|"
    r"Found (\d{1,9}) layer\(s\) eligible to use sparse tactics)(?:: *(.*))?"
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers|"
    r"Chose (\d{1,9}) layer\(s\) using sparse tactics)(?:: *(.*))?"
)
WEIGHT_BYTES = re.compile(r"Total Weights Memory: (\d{1,18}) bytes")
# A line may hold a megabyte, so no expression looks for its end from each of many beginnings.
NAME, KIND, TACTIC, CONSTANTS, ONNX_LAYER = "Name: ", ", LayerType: ", "TacticName: ", "Constants: [", "[ONNX Layer: "
TACTIC_END = re.compile(r", (?:TacticValue|StreamId|Metadata)\b")
CONSTANTS_END = re.compile(r"\} *\]")
DIMENSIONS = re.compile(r"Dimensions: \[([-\d, ]*)\],")
SPARSE_WEIGHTS = re.compile(r"HasSparseWeights: ([01])")
WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)", "Count": (\d{1,18})')
# sm80_xmma_sparse_gemm_..._sptensor16x8x64, sm80_xmma_sparse_conv_..., and the names of cuSPARSELt and CUTLASS.
SPARSE_TACTIC = re.compile(r"sparse|sptensor|spmma|sp_?gemm", re.I)
# What begins a build (trtexec, build_engine.py), and what ends one.
BEGIN = re.compile(r"&&&& RUNNING TensorRT|\btensorrt(?:_rtx)? [\d.]{1,40}, sparse weights allowed")
END = re.compile(r"&&&& (?:PASSED|FAILED) TensorRT|Engine built in |Engine generation completed in ")
# TensorRT-RTX says who it is in the log, and names a stub for a kernel it chooses when the engine first runs.
RTX = re.compile(r"\btensorrt[-_]rtx(?: version:?)? \[?v?\d+\.\d", re.I)
STUB = "CASK_STUB"
TYPES = {"int8": "int8", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "float": "fp32", "fp32": "fp32"}


class SparsityLine(NamedTuple):
    """What one ``(Sparsity)`` line says; ``version_8`` as in `Choice`."""

    number: int
    names: tuple[str, ...]
    version_8: bool


@dataclass(frozen=True)
class EngineConstant:
    """A constant of an engine layer.

    Attributes:
        type: ``int8``, ``fp16``, ``fp32``, or TensorRT's own word for another one.
        count: number of elements, 0 where a size is free.
    """

    type: str
    count: int


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        kind: TensorRT's layer type, e.g. ``gemm`` or ``CaskConvolution``.
        tactic: name of the kernel, empty where there is none.
        nodes: ONNX nodes in the layer, as far as TensorRT lists them.
        constants: tensors stored in the engine that it reads, where TensorRT lists them apart from its inputs.
        eligible: whether TensorRT takes its weights for 2:4, None where it does not say.
    """

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    constants: tuple[EngineConstant, ...]
    eligible: bool | None = None

    @property
    def sparse(self) -> bool:
        """Whether its kernel is a sparse one."""
        return SPARSE_TACTIC.search(self.tactic) is not None


@dataclass(frozen=True)
class Choice:
    """A pair of ``(Sparsity)`` lines: how many engine layers, and those names that are listed.

    Attributes:
        version_8: whether it has the form of TensorRT 8.
    """

    eligible: int
    chosen: int
    eligible_names: tuple[str, ...]
    chosen_names: tuple[str, ...]
    version_8: bool = False

    @property
    def lists_all_names(self) -> bool:
        """Whether the lines name every layer that they count."""
        return len(self.eligible_names) == self.eligible and len(self.chosen_names) == self.chosen


@dataclass(frozen=True)
class BuildLog:
    """What a log, a layer file, or both say.

    Attributes:
        choice: None without ``(Sparsity)`` lines.
        weight_bytes: of all weights in the engine, None where the log does not say.
        is_rtx: whether TensorRT-RTX wrote the log.
        builds: how many builds the log holds; all else is of the last.
    """

    choice: Choice | None = None
    layers: tuple[EngineLayer, ...] = ()
    weight_bytes: int | None = None
    is_rtx: bool = False
    builds: int = 1

    @property
    def chosen_later(self) -> bool:
        """Whether the log names no kernels, and leaves the choice to the first run of the engine."""
        return self.choice is None and (self.is_rtx or any(STUB in layer.tactic for layer in self.layers))


def read_log(path: Path, *, alone: bool = True) -> BuildLog:
    """Read the log of a build.

    Args:
        alone: whether there is no layer information beside it, so that it must name sparse kernels.

    Raises:
        SqatError: no such file, cut short, or nothing in it about sparse kernels.
    """
    text = read_text(path)
    try:
        log = parse_log(text)
    except ValueError as error:
        raise unreadable(path, str(error), "give the whole log of the build") from error
    if alone and log.choice is None and not log.layers:
        says_nothing = "says nothing of sparse kernels"
        says_nothing += f" in the last of its {log.builds} builds" if log.builds > 1 else ""
        raise unreadable(
            path,
            says_nothing if text.strip() else "is empty",
            "build with --sparsity=enable --verbose and keep everything it prints",
        )
    return log


def unreadable(path: Path, problem: str, hint: str = "") -> SqatError:
    """The error about a file that does not say what it should."""
    return SqatError(problem, hint, str(path), code="unreadable-file")


def read_text(path: Path) -> str:
    """Read a log as text; PowerShell's redirection writes UTF-16."""
    content = read_bytes(path, limit=LARGEST_LOG)
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")


def parse_log(text: str) -> BuildLog:
    """Parse a log, which may say nothing.

    Raises:
        ValueError: an ``eligible`` line without its ``chosen`` line, or more chosen than eligible.
    """
    # splitlines would also split at the \x1e between the ONNX nodes of a layer
    builds = split_builds(re.split("\r?\n", text))
    return replace(parse_build(builds[-1]), builds=len(builds))


def split_builds(lines: list[str]) -> list[list[str]]:
    """Split the lines of a log into those of each build; what stands before the first belongs to it."""
    builds: list[list[str]] = [[]]
    begun = ended = False
    for line in lines:
        is_begin = BEGIN.search(line) is not None
        is_next = (is_begin and begun) or (ended and (is_begin or ELIGIBLE.search(line) is not None))
        if is_next:
            builds.append([])
            begun = ended = False
        begun = begun or is_begin
        ended = ended or END.search(line) is not None
        builds[-1].append(line)
    return builds


def parse_build(lines: list[str]) -> BuildLog:
    """Parse the lines of one build.

    Raises:
        ValueError: see `parse_log`.
    """
    eligible: list[SparsityLine] = []
    chosen: list[SparsityLine] = []
    layers: list[EngineLayer] = []
    weight_bytes, is_rtx = None, False
    for line in lines:
        if match := ELIGIBLE.search(line):
            eligible.append(parse_sparsity_line(match))
        elif match := CHOSEN.search(line):
            chosen.append(parse_sparsity_line(match))
        elif (layer := parse_layer_line(line)) is not None:
            layers.append(layer)
        elif match := WEIGHT_BYTES.search(line):
            weight_bytes = int(match[1])
        elif RTX.search(line):
            is_rtx = True
    return BuildLog(largest_pair(eligible, chosen), tuple(dict.fromkeys(layers)), weight_bytes, is_rtx)


def parse_sparsity_line(match: re.Match[str]) -> SparsityLine:
    """Number and names in a ``(Sparsity)`` line; the older form has only names."""
    names = tuple(name for part in (match[2] or "").split(", ") if (name := part.strip(", ")) and name != "...")
    return SparsityLine(len(names), names, True) if match[1] is None else SparsityLine(int(match[1]), names, False)


def largest_pair(eligible: list[SparsityLine], chosen: list[SparsityLine]) -> Choice | None:
    """The pair about the whole engine; TensorRT writes one for each part that it builds."""
    if len(eligible) != len(chosen):
        raise ValueError("is cut short: it lists eligible layers, but not which of them chose a sparse kernel")
    pairs = [
        Choice(before.number, after.number, before.names, after.names, before.version_8)
        for before, after in zip(eligible, chosen, strict=True)
    ]
    for pair in pairs:
        if pair.chosen > pair.eligible:
            raise ValueError(f"is damaged: {pair.chosen} layers chosen of {pair.eligible} eligible ones")
    return max(pairs, key=lambda pair: (pair.eligible, pair.chosen), default=None)


def parse_layer_line(line: str) -> EngineLayer | None:
    """Parse a layer's line in a verbose log; None for any other line."""
    name, separator, rest = line.partition(NAME)[2].partition(KIND)
    kind, comma, rest = rest.partition(",")
    if not separator or not comma:
        return None
    weights = WEIGHTS.findall(rest)
    constants = [*constants_in(rest), *(EngineConstant(type_name(kind), int(number)) for kind, number in weights)]
    eligible = SPARSE_WEIGHTS.search(rest)
    return EngineLayer(
        name=name,
        kind=kind.strip(),
        tactic=tactic_in(rest),
        nodes=nodes_in(rest.rpartition("Metadata: ")[2]),
        constants=tuple(constants),
        eligible=None if eligible is None else eligible[1] == "1",
    )


def tactic_in(text: str) -> str:
    """Name of the kernel in a layer's line; empty where there is none."""
    found = text.partition(TACTIC)[2]
    end = TACTIC_END.search(found)
    return found[: end.start()] if end else ""


def constants_in(text: str) -> list[EngineConstant]:
    """Constants in a layer's line."""
    listed = text.partition(CONSTANTS)[2].lstrip(" ")
    end = CONSTANTS_END.search(listed) if listed.startswith("{") else None
    tensors = [
        (dimensions[1], tensor[dimensions.end() :].partition("Datatype: ")[2].partition(",")[0])
        for tensor in listed[: end.start() if end else 0].split("}")
        if (dimensions := DIMENSIONS.search(tensor)) is not None
    ]
    return [EngineConstant(type_name(kind), count_elements(sizes.split(","))) for sizes, kind in tensors if kind]


def nodes_in(metadata: str) -> tuple[str, ...]:
    """ONNX nodes that a layer's metadata lists."""
    return tuple(part.partition("]")[0] for part in metadata.split(ONNX_LAYER)[1:] if "]" in part)


def read_layers(path: Path) -> BuildLog:
    """Read the JSON of ``trtexec --exportLayerInfo`` or IEngineInspector.

    Raises:
        SqatError: no such file, not JSON, cut short, or without details of the layers.
    """
    text = read_text(path)
    try:
        content = parse_json(text, str(path))
    except SqatError as error:
        problem = error.problem.replace("is not JSON", "is not JSON, or cut short") if text.strip() else "is empty"
        raise unreadable(path, problem, "export the layer information again") from error
    entries = content.get("Layers") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise unreadable(path, "holds no list of layers", "give the file of trtexec --exportLayerInfo")
    if not all(isinstance(entry, dict) and "LayerType" in entry for entry in entries):
        raise unreadable(path, "names the layers and no more", "build with --profilingVerbosity=detailed")
    try:
        return BuildLog(layers=tuple(parse_layer_entry(entry) for entry in entries))
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(path, f"describes a layer in an unknown form: {error}") from error


def parse_layer_entry(entry: dict[str, Any]) -> EngineLayer:
    """Parse a layer's JSON entry."""
    tensors = entry.get("Constants", [])
    constants = [
        EngineConstant(
            type_name(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))),
            count_elements(tensor["Dimensions"]),
        )
        for tensor in tensors
        if isinstance(tensor, dict) and isinstance(tensor.get("Dimensions"), list)
    ]
    weights = entry.get("Weights")
    if isinstance(weights, dict):
        constants.append(EngineConstant(type_name(str(weights.get("Type", ""))), int(weights.get("Count", 0))))
    name, kind, tactic, metadata = (str(entry.get(key, "")) for key in ("Name", "LayerType", "TacticName", "Metadata"))
    eligible = entry.get("HasSparseWeights")
    return EngineLayer(
        name, kind, tactic, nodes_in(metadata), tuple(constants), None if eligible is None else bool(eligible)
    )


def type_name(text: str) -> str:
    """``int8`` of ``Int8``, of ``Row major linear INT8`` and of TensorRT's other spellings."""
    words = re.findall(r"[a-z]+\d*", text.lower())
    return next((TYPES[word] for word in words if word in TYPES), text.strip())


def count_elements(dimensions: list[Any]) -> int:
    """Number of elements, 0 where a size is free or missing."""
    sizes = [parse_size(str(size)) for size in dimensions if str(size).strip()]
    return prod(sizes) if sizes and min(sizes) > 0 else 0


def parse_size(text: str) -> int:
    """Read a size of a tensor.

    Raises:
        ValueError: it is no whole number of up to 18 digits.
    """
    digits = text.strip()
    if len(digits) > 18 or not digits.removeprefix("-").isdecimal():
        raise ValueError(f"a tensor of size {digits[:40]!r}")
    return int(digits)


def merge(log: BuildLog | None, layers: BuildLog | None) -> BuildLog:
    """Put a log and a layer file of one build together; the file's layers replace the log's."""
    if log is None or layers is None:
        return log or layers or BuildLog()
    return replace(log, layers=layers.layers)
