"""Read what a build log or a layer-information file says of an engine, whichever TensorRT wrote it.

It reads the ``(Sparsity)`` lines in both their forms (TensorRT 8; 10 to 11), the weight bytes, and the engine's
layers: from JSON, or from the ``Layers:`` part of a verbose log. Lines may have any prefix.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sqat.errors import SqatError

ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|"
    r"Found (\d+) layer\(s\) eligible to use sparse tactics)(?:: *(.*))?"
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers|"
    r"Chose (\d+) layer\(s\) using sparse tactics)(?:: *(.*))?"
)
WEIGHT_BYTES = re.compile(r"Total Weights Memory: (\d+) bytes")
LAYER_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*),(?P<rest>.*)")
TACTIC = re.compile(r"TacticName: (.*?), (?:TacticValue|StreamId|Metadata)\b")
CONSTANTS = re.compile(r"Constants: \[(?: *(\{.*?\}) *)?\]")
TENSOR = re.compile(r"Dimensions: \[([-\d, ]*)\],[^}]*?Datatype: ([^,}]*)")
SPARSE_WEIGHTS = re.compile(r"HasSparseWeights: ([01])")
WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)", "Count": (\d+)')
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# sm80_xmma_sparse_gemm_..._sptensor16x8x64, sm80_xmma_sparse_conv_..., and the names of cuSPARSELt and CUTLASS.
SPARSE_TACTIC = re.compile(r"sparse|sptensor|spmma|sp_?gemm", re.I)
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
    """

    choice: Choice | None = None
    layers: tuple[EngineLayer, ...] = ()
    weight_bytes: int | None = None
    is_rtx: bool = False

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
        raise unreadable(
            path,
            "says nothing of sparse kernels" if text.strip() else "is empty",
            "build with --sparsity=enable --verbose and keep everything it prints",
        )
    return log


def unreadable(path: Path, problem: str, hint: str = "") -> SqatError:
    """The error about a file that does not say what it should."""
    return SqatError(problem, hint, str(path), code="unreadable-file")


def read_text(path: Path) -> str:
    """Read a log as text; PowerShell's redirection writes UTF-16."""
    if not path.is_file():
        raise SqatError("no such file", place=str(path), code="missing-file")
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")


def parse_log(text: str) -> BuildLog:
    """Parse a log, which may say nothing.

    Raises:
        ValueError: an ``eligible`` line without its ``chosen`` line, or more chosen than eligible.
    """
    eligible: list[SparsityLine] = []
    chosen: list[SparsityLine] = []
    layers: list[EngineLayer] = []
    weight_bytes, is_rtx = None, False
    for line in re.split("\r?\n", text):  # splitlines would also split at the \x1e between the ONNX nodes of a layer
        if match := ELIGIBLE.search(line):
            eligible.append(parse_sparsity_line(match))
        elif match := CHOSEN.search(line):
            chosen.append(parse_sparsity_line(match))
        elif match := LAYER_LINE.search(line):
            layers.append(parse_layer_line(match))
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


def parse_layer_line(match: re.Match[str]) -> EngineLayer:
    """Parse a layer's line in a verbose log."""
    rest = match["rest"]
    tactic = TACTIC.search(rest)
    tensors = TENSOR.findall(constants_text[1] or "") if (constants_text := CONSTANTS.search(rest)) else []
    weights = WEIGHTS.findall(rest)
    constants = [EngineConstant(type_name(kind), count_elements(dimensions.split(","))) for dimensions, kind in tensors]
    constants += [EngineConstant(type_name(kind), int(number)) for kind, number in weights]
    metadata = rest.rpartition("Metadata: ")[2]
    eligible = SPARSE_WEIGHTS.search(rest)
    return EngineLayer(
        name=match["name"],
        kind=match["kind"].strip(),
        tactic=tactic[1] if tactic else "",
        nodes=tuple(ONNX_LAYER.findall(metadata)),
        constants=tuple(constants),
        eligible=None if eligible is None else eligible[1] == "1",
    )


def read_layers(path: Path) -> BuildLog:
    """Read the JSON of ``trtexec --exportLayerInfo`` or IEngineInspector.

    Raises:
        SqatError: no such file, not JSON, cut short, or without details of the layers.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        problem = "is empty" if not text.strip() else "is not JSON, or cut short"
        raise unreadable(path, problem, "export the layer information again") from error
    entries = content.get("Layers") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise unreadable(path, "holds no list of layers", "give the file of trtexec --exportLayerInfo")
    if not all(isinstance(entry, dict) and "LayerType" in entry for entry in entries):
        raise unreadable(path, "names the layers and no more", "build with --profilingVerbosity=detailed")
    try:
        return BuildLog(layers=tuple(parse_layer_entry(entry) for entry in entries))
    except (TypeError, ValueError) as error:
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
    nodes = tuple(ONNX_LAYER.findall(metadata))
    return EngineLayer(name, kind, tactic, nodes, tuple(constants), None if eligible is None else bool(eligible))


def type_name(text: str) -> str:
    """``int8`` of ``Int8``, of ``Row major linear INT8`` and of TensorRT's other spellings."""
    words = re.findall(r"[a-z]+\d*", text.lower())
    return next((TYPES[word] for word in words if word in TYPES), text.strip())


def count_elements(dimensions: list[Any]) -> int:
    """Number of elements, 0 where a size is free or missing."""
    sizes = [int(size) for size in dimensions if str(size).strip()]
    return prod(sizes) if sizes and min(sizes) > 0 else 0


def merge(log: BuildLog | None, layers: BuildLog | None) -> BuildLog:
    """Put a log and a layer file of one build together; the file's layers replace the log's."""
    if log is None or layers is None:
        return log or layers or BuildLog()
    return BuildLog(log.choice, layers.layers, log.weight_bytes, log.is_rtx)
