"""Float graphs of models, each traced once in a run whichever process asks first: a trace takes seconds.

`traced` is `export_float` with a memory: a folder that the processes of one run share. A graph is found again by all
that goes into it (the model's modules, weights, hooks and config, the example and the output's name), so a model that
differs in anything is traced for itself, and so is one that holds something unknown here. No run reads the folder of
another: pytest makes a new one.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import onnx
import torch
from filelock import FileLock
from onnx import ModelProto
from torch import Tensor, nn

from sqat.export.graph import export_float
from sqat.export.traced_graphs import TracedGraphs

PLAIN = (bool, int, float, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
ORIGIN = ("_name_or_path", "name_or_path")  # the folder a model was loaded from, which a graph does not hold
FOLDER: list[Path] = []


def share(folder: Path) -> None:
    """Keep the graphs that this process traces in a folder, and look for them there."""
    FOLDER[:] = [folder]
    folder.mkdir(exist_ok=True)


def traced(model: nn.Module, inputs: Mapping[str, Tensor], *names: str | None) -> ModelProto:
    """What `export_float` returns for these arguments; the caller's own to change."""
    key = digest((model, dict(inputs), names)) if FOLDER else None
    if key is None:
        return export_float(model, inputs, *names)
    path = FOLDER[0] / f"{key}.onnx"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            onnx.save(export_float(model, inputs, *names), unfinished)
            unfinished.replace(path)
    return onnx.load(path)


def traced_by_architecture(model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> ModelProto:
    """What a rehearsal takes for `export_float`: one trace for all weights, filled with the model's own."""
    return TracedGraphs().export(model, inputs, output)


class UnknownPartError(ValueError):
    """What cannot be told from another of its kind."""


def digest(value: object) -> str | None:
    """Of all that makes up a model; None where some part is of a kind unknown here."""
    found = hashlib.sha256()
    try:
        for part in described(value, {}):
            found.update(part)
    except UnknownPartError:
        return None
    return found.hexdigest()


def described(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """The value in words; of what was met before only which one it was, so that tied weights count as tied."""
    if isinstance(value, PLAIN):
        yield f"{type(value)} {value!r};".encode()
    elif isinstance(value, type | BuiltinFunctionType) or (isinstance(value, FunctionType) and not is_local(value)):
        yield f"{value.__module__}.{value.__qualname__};".encode()
    elif isinstance(value, list | tuple):
        yield f"{type(value)} {len(value)}:".encode()
        for entry in value:
            yield from described(entry, seen)
    elif isinstance(value, set | frozenset):
        yield from described(sorted(value, key=repr), seen)
    elif isinstance(value, Mapping):
        yield f"{type(value)} {len(value)}:".encode()
        for key, entry in value.items():
            yield from described((key, entry if key not in ORIGIN else ""), seen)
    elif id(value) in seen:
        yield f"again {list(seen).index(id(value))};".encode()
    else:
        seen[id(value)] = value  # kept, so that its id is not another's
        yield f"{type(value)}:".encode()
        yield from described_object(value, seen)


def described_object(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """Values that may be one and the same in two places."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        raw = array.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield from described((array.dtype, array.shape, value.stride(), raw), seen)
    elif isinstance(value, nn.Module):
        parts = {name: hooks(part) if "hooks" in name else part for name, part in vars(value).items()}
        yield from described(parts, seen)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = value.__code__
        yield from described((value.__qualname__, code.co_code, code.co_names), seen)
        yield from described(([entry for entry in code.co_consts if isinstance(entry, PLAIN)], cells), seen)
        yield from described((value.__defaults__, value.__kwdefaults__), seen)
    elif isinstance(value, functools.partial):
        yield from described((value.func, value.args, value.keywords), seen)
    elif isinstance(value, MethodType):
        yield from described((value.__func__, value.__self__), seen)
    elif hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
        yield from described(vars(value), seen)
    else:
        raise UnknownPartError(type(value))


def is_local(function: FunctionType) -> bool:
    return "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__


def hooks(registered: Any) -> Any:
    """Hooks in their order; their keys count all hooks of the process."""
    return list(registered.values()) if isinstance(registered, Mapping) else registered
