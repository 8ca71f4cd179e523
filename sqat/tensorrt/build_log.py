"""What a build log or a layer-information file says an engine was made of, whichever TensorRT wrote it (rule T19).

What: the ``(Sparsity)`` lines in both their forms (TensorRT 8, and 10 to 11), the weight bytes, and the layers of the
engine, from the JSON that trtexec and IEngineInspector write or from the ``Layers:`` part of a verbose log, where each
is a line of the same content. Nothing is known here of the ONNX file: `sqat.tensorrt.report` brings both together.

Why so tolerant: a log passes through terminals, loggers and continuous integration, so lines may have any prefix and
anything may stand between. A log that ends too early is refused all the same: half of the truth would read as
"no sparse kernel". Left out: lines that a terminal has wrapped.
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


class Named(NamedTuple):
    """What one ``(Sparsity)`` line says; ``version_8`` as in `Choice`."""

    number: int
    names: tuple[str, ...]
    version_8: bool


@dataclass(frozen=True)
class Tensor:
    """A constant of an engine layer: type (``int8``, ``fp16``, ``fp32`` or TensorRT's own word) and number of elements,
    0 where a size is free."""

    type: str
    count: int


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        kind: TensorRT's layer type, e.g. ``gemm`` or ``CaskConvolution``.
        tactic: name of the kernel, empty where there is none.
        nodes: ONNX nodes that the layer is made from, as far as it tells.
        constants: what it reads that is stored in the engine, where TensorRT tells that apart from its inputs.
        eligible: whether its weights are 2:4 to TensorRT, None where it does not say.
    """

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    constants: tuple[Tensor, ...]
    eligible: bool | None = None

    @property
    def sparse(self) -> bool:
        """Whether its kernel is a sparse one."""
        return SPARSE_TACTIC.search(self.tactic) is not None


@dataclass(frozen=True)
class Choice:
    """A pair of ``(Sparsity)`` lines: how many engine layers, and the names as far as they are listed.

    Attributes:
        version_8: whether it is the form of TensorRT 8.
    """

    eligible: int
    chosen: int
    eligible_names: tuple[str, ...]
    chosen_names: tuple[str, ...]
    version_8: bool = False

    @property
    def names_all(self) -> bool:
        """Whether every layer is named."""
        return len(self.eligible_names) == self.eligible and len(self.chosen_names) == self.chosen


@dataclass(frozen=True)
class BuildLog:
    """What was found in a log, a layer file, or both.

    Attributes:
        choice: None where no ``(Sparsity)`` line was found.
        weight_bytes: of all weights in the engine, None where not told.
        of_rtx: whether TensorRT-RTX names itself.
    """

    choice: Choice | None = None
    layers: tuple[EngineLayer, ...] = ()
    weight_bytes: int | None = None
    of_rtx: bool = False

    @property
    def chosen_later(self) -> bool:
        """Whether kernels are chosen only when the engine first runs (TensorRT-RTX)."""
        return self.choice is None and (self.of_rtx or any(STUB in layer.tactic for layer in self.layers))


def read_log(path: Path, *, alone: bool = True) -> BuildLog:
    """Read the log of a build.

    Args:
        alone: whether it is all there is, so that it has to tell of sparse kernels.

    Raises:
        SqatError: no such file, cut short, or nothing in it that tells of sparse kernels.
    """
    text = read_text(path)
    try:
        log = parse_log(text)
    except ValueError as error:
        raise SqatError(str(error), "give the whole log of the build", str(path)) from error
    if alone and log.choice is None and not log.layers:
        raise SqatError(
            "says nothing of sparse kernels" if text.strip() else "is empty",
            "build with --sparsity=enable --verbose and keep everything it prints",
            str(path),
        )
    return log


def read_text(path: Path) -> str:
    """A log as text; PowerShell's redirection writes UTF-16."""
    if not path.is_file():
        raise SqatError("no such file", place=str(path))
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")


def parse_log(text: str) -> BuildLog:
    """What a log says; nothing in it is not an error here.

    Raises:
        ValueError: an ``eligible`` line without its ``chosen`` line, or more chosen than eligible.
    """
    eligible: list[Named] = []
    chosen: list[Named] = []
    layers: list[EngineLayer] = []
    weight_bytes, of_rtx = None, False
    for line in re.split("\r?\n", text):  # splitlines would also split at the \x1e between the ONNX nodes of a layer
        if found := ELIGIBLE.search(line):
            eligible.append(count_names(found))
        elif found := CHOSEN.search(line):
            chosen.append(count_names(found))
        elif found := LAYER_LINE.search(line):
            layers.append(layer_of_line(found))
        elif found := WEIGHT_BYTES.search(line):
            weight_bytes = int(found[1])
        elif RTX.search(line):
            of_rtx = True
    return BuildLog(largest_pair(eligible, chosen), tuple(dict.fromkeys(layers)), weight_bytes, of_rtx)


def count_names(found: re.Match[str]) -> Named:
    """Number and names in a ``(Sparsity)`` line; the older form has only names."""
    names = tuple(name for part in (found[2] or "").split(", ") if (name := part.strip(", ")) and name != "...")
    return Named(len(names), names, True) if found[1] is None else Named(int(found[1]), names, False)


def largest_pair(eligible: list[Named], chosen: list[Named]) -> Choice | None:
    """The pair about the whole engine: TensorRT writes one for each part it builds."""
    if len(eligible) != len(chosen):
        raise ValueError("is cut short: it says which layers are eligible for sparse kernels, not which were chosen")
    pairs = [
        Choice(found.number, picked.number, found.names, picked.names, found.version_8)
        for found, picked in zip(eligible, chosen, strict=True)
    ]
    for pair in pairs:
        if pair.chosen > pair.eligible:
            raise ValueError(f"is damaged: {pair.chosen} layers chosen of {pair.eligible} eligible ones")
    return max(pairs, key=lambda pair: (pair.eligible, pair.chosen), default=None)


def layer_of_line(found: re.Match[str]) -> EngineLayer:
    """A layer from its line in a verbose log."""
    rest = found["rest"]
    tactic = TACTIC.search(rest)
    tensors = TENSOR.findall(constants_text[1] or "") if (constants_text := CONSTANTS.search(rest)) else []
    weights = WEIGHTS.findall(rest)
    constants = [Tensor(type_name(kind), count(dimensions.split(","))) for dimensions, kind in tensors]
    constants += [Tensor(type_name(kind), int(number)) for kind, number in weights]
    metadata = rest.rpartition("Metadata: ")[2]
    eligible = SPARSE_WEIGHTS.search(rest)
    return EngineLayer(
        name=found["name"],
        kind=found["kind"].strip(),
        tactic=tactic[1] if tactic else "",
        nodes=tuple(ONNX_LAYER.findall(metadata)),
        constants=tuple(constants),
        eligible=None if eligible is None else eligible[1] == "1",
    )


def read_layers(path: Path) -> BuildLog:
    """Read the JSON of ``trtexec --exportLayerInfo`` or of IEngineInspector.

    Raises:
        SqatError: no such file, not JSON, cut short, or without details of the layers.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        what = "is empty" if not text.strip() else "is not JSON, or cut short"
        raise SqatError(what, "export the layer information again", str(path)) from error
    entries = content.get("Layers") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise SqatError("holds no list of layers", "give the file of trtexec --exportLayerInfo", str(path))
    if not all(isinstance(entry, dict) and "LayerType" in entry for entry in entries):
        raise SqatError("names the layers and no more", "build with --profilingVerbosity=detailed", str(path))
    try:
        return BuildLog(layers=tuple(layer_of_entry(entry) for entry in entries))
    except (TypeError, ValueError) as error:
        raise SqatError(f"describes a layer in a way that is not known: {error}", place=str(path)) from error


def layer_of_entry(entry: dict[str, Any]) -> EngineLayer:
    """A layer from its JSON entry."""
    tensors = entry.get("Constants", [])
    constants = [
        Tensor(type_name(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))), count(tensor["Dimensions"]))
        for tensor in tensors
        if isinstance(tensor, dict) and isinstance(tensor.get("Dimensions"), list)
    ]
    weights = entry.get("Weights")
    if isinstance(weights, dict):
        constants.append(Tensor(type_name(str(weights.get("Type", ""))), int(weights.get("Count", 0))))
    name, kind, tactic, metadata = (str(entry.get(key, "")) for key in ("Name", "LayerType", "TacticName", "Metadata"))
    eligible = entry.get("HasSparseWeights")
    nodes = tuple(ONNX_LAYER.findall(metadata))
    return EngineLayer(name, kind, tactic, nodes, tuple(constants), None if eligible is None else bool(eligible))


def type_name(text: str) -> str:
    """``int8`` of ``Int8``, of ``Row major linear INT8`` and of the other ways to say it."""
    words = re.findall(r"[a-z]+\d*", text.lower())
    return next((TYPES[word] for word in words if word in TYPES), text.strip())


def count(dimensions: list[Any]) -> int:
    """Number of elements, 0 where a size is free or the shape is not told."""
    sizes = [int(size) for size in dimensions if str(size).strip()]
    return prod(sizes) if sizes and min(sizes) > 0 else 0


def merge(log: BuildLog | None, layers: BuildLog | None) -> BuildLog:
    """What a log and a layer file of one build say together; the file's layers count."""
    if log is None or layers is None:
        return log or layers or BuildLog()
    return BuildLog(log.choice, layers.layers, log.weight_bytes, log.of_rtx)
