"""The files of a foreign model: what its config and the headers of its weights say, before anything is built.

A folder may come from a stranger. Its sizes are compared with its weights' headers, on torch's meta device, so that a
config that lies costs neither memory nor time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sqat.errors import SqatError
from sqat.files.read import MAX_JSON, MEGABYTE, open_file, parse_json, read_json

CONFIG = "config.json"
# The JSON files that libraries open. Others, such as trainer_state.json, may hold anything.
TABLES = ("modules.json", "tokenizer.json", "added_tokens.json", "vocab.json", "model.safetensors.index.json")
OBJECTS = (
    CONFIG,
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json"),
)
READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".bin")  # suffixes of what libraries open
SMALL = 4 * MEGABYTE  # JSON up to this size is parsed here; larger is a vocabulary
MAX_HEADER = 100 * MEGABYTE  # of a safetensors file, as its own library says
LARGEST = 1 << 24  # size in a config
# Names of entries that are sizes or counts. Others hold any number: ids, seeds, lengths, bases of hashes.
SIZE = re.compile(r"num_\w+|(\w+_)?(sizes?|dims?|layers?|heads?|channels|embeddings|positions|experts|depths|blocks)")
NO_SIZE = re.compile(r"(\w+_)?(window|chunk)_sizes?")  # how far attention or a reader looks
# Entries that must be whole numbers of at least 1, where a config has them.
SIZES = (
    *("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "embed_dim", "hidden_dim", "head_dim", "patch_size"),
    *("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size", "num_channels"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_attention_heads"),
)
SPARE_MODULES = 4000  # beside four for each tensor: dropouts, activations, shared layers
MOST_MODULES = 50_000
SPARE_WEIGHTS = 1 << 24  # beside twice those of the files: a new head or pooler, tied tables


def check_regular(folder: Path) -> None:
    """Refuse a folder with a pipe, a device or a broken link where a library would open a file.

    Raises:
        SqatError: it names the file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ:
            open_file(path).close()


def check_source(folder: Path) -> dict[str, tuple[int, ...]]:
    """Check the JSON files of a model, and read the shapes of its weights from their headers.

    Raises:
        SqatError: it names the file, and the entry where there is one.
    """
    for path in (folder / name for name in sorted((*TABLES, *OBJECTS))):
        if path.exists() and not SMALL < path.stat().st_size <= MAX_JSON:
            entries = read_json(path)
            if path.name == CONFIG:
                check_config(entries, str(path))
            elif path.name in OBJECTS and not isinstance(entries, dict):
                raise SqatError("is no JSON object", "get the model again", str(path), code="unreadable-file")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SqatError("no file named model.safetensors is in the folder", "save the weights as safetensors",
                        str(folder), code="unsupported-model")  # fmt: skip
    return {name: shape for path in paths for name, shape in read_header(path).items()}


def header_of(source: str) -> dict[str, tuple[int, ...]] | None:
    """Check the files of a local source and read the shapes of its weights; None for a hub model."""
    return check_source(Path(source)) if Path(source).is_dir() else None


def check_config(entries: Any, place: str) -> None:
    """Check the entries of config.json that decide how large a model is.

    Raises:
        SqatError: it names the entry.
    """
    if not isinstance(entries, dict):
        raise SqatError("is no JSON object", "get the model again", place, code="unreadable-file")
    if "model_type" in entries and not isinstance(entries["model_type"], str):
        raise bad_entry("model_type", entries["model_type"], "is a text", place)
    for name, value in entries.items():
        if name == "quantization_config" and value:
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
            raise SqatError(f"quantization_config: the weights are quantized already ({method})",
                            "get the model with float weights", place, code="unsupported-model")  # fmt: skip
        if name.endswith("_config") and isinstance(value, dict):
            check_config({key: entry for key, entry in value.items() if key != "model_type"}, place)
        if name in SIZES and value is not None:
            for size in value if isinstance(value, list) else [value]:  # a list has one for each stage
                if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                    raise bad_entry(name, value, "is a whole number of at least 1", place)
        is_size = name in SIZES or (SIZE.fullmatch(name) and not NO_SIZE.fullmatch(name))
        numbers = value if isinstance(value, list) else [value]
        if is_size and any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
            raise bad_entry(name, value, f"is at most {LARGEST}", place)


def bad_entry(name: str, value: object, allowed: str, place: str) -> SqatError:
    """Make the error for an entry of a config."""
    return SqatError(f"{name} is {str(value)[:40]!r}; it {allowed}", "get the model again", place,
                     code="unsupported-model")  # fmt: skip


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file.

    Raises:
        SqatError: its header is none, or lies.
    """
    with open_file(path) as file:
        size, start = path.stat().st_size, file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise bad_header("it is cut short, or its header is longer than the file", path)
        header = parse_json(file.read(length), str(path))
    if not isinstance(header, dict):
        raise bad_header("the header is no JSON object", path)
    shapes = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise bad_header(f"{name!r} has no shape", path)
        if math.prod(shape) > 8 * size:  # of values of at least a bit
            raise bad_header(f"{name!r} has the shape {shape}, which is larger than the file", path)
        shapes[name] = tuple(shape)
    return shapes


def bad_header(problem: str, path: Path) -> SqatError:
    """Make the error for a safetensors file with a header that cannot be."""
    return SqatError(f"is no sound safetensors file: {problem}", "get the model again", str(path),
                     code="unreadable-file")  # fmt: skip


@contextmanager
def bounded_modules(limit: int, place: str) -> Iterator[None]:
    """Refuse a model of more modules than a limit while it is built inside the block.

    Raises:
        SqatError: the config describes more.
    """
    count = 0

    def count_module(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise SqatError(f"describes a model of more than {limit} modules, which its weights do not have",
                            "check its number of layers", place, code="model-mismatch")  # fmt: skip

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        handle.remove()


def shapes_on_meta(
    make: Callable[[Any], nn.Module], config: Any, header: Mapping[str, tuple[int, ...]] | None, place: str
) -> dict[str, torch.Size]:
    """Return the shapes of a model's weights by its config, without their memory.

    Args:
        make: makes a model by a config.
        header: shapes of the source's files, with which the sizes are compared; None for those of a hub model.

    Raises:
        SqatError: the config describes a far larger model.
    """
    limit = MOST_MODULES if header is None else 4 * len(header) + SPARE_MODULES
    with torch.device("meta"), bounded_modules(limit, place):
        shapes = {name: tensor.shape for name, tensor in make(config).state_dict().items()}
    if header is not None:
        check_size(shapes, header, place)
    return shapes


def check_size(shapes: Mapping[str, torch.Size], header: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Refuse a config that describes far more weights than its files hold."""
    described = sum(math.prod(shape) for shape in shapes.values())
    held = sum(math.prod(shape) for shape in header.values())
    if described > 2 * held + SPARE_WEIGHTS:
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        raise SqatError(f"describes {described} weights, but the files hold {held}; the largest is {largest} "
                        f"{list(shapes[largest])}", "get the model again", place,
                        code="model-mismatch")  # fmt: skip
