"""How a sentence encoder pools tokens to one vector, as the files of its sentence-transformers folder say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sqat.checkpoint.manifest import SIDE_FILES
from sqat.compat import find_source_file
from sqat.errors import SqatError
from sqat.files.read import MAX_JSON, parse_json, read_bytes

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING, NORMALIZE = "1_Pooling/config.json", "2_Normalize/config.json"
Read = Callable[[str], bytes | None]  # the content of a source's file; None where there is no such file


@dataclass(frozen=True)
class Embeddings:
    """What the model returns: one vector a text, [B, H]."""

    logits: Tensor


@dataclass(frozen=True)
class Pooling:
    """How the states of tokens become a vector: ``mean``, ``cls`` (first token) or ``max``, of length 1 or not."""

    mode: str = "mean"
    normalized: bool = True

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Tensor], output: Any) -> Embeddings:
        """Forward hook of an AutoModel: pool its last states [B, T, H] over the attention mask [B, T]."""
        vectors = POOLS[self.mode](output.last_hidden_state, kwargs["attention_mask"])
        return Embeddings(normalize(vectors, dim=-1) if self.normalized else vectors)


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return the state of the first real token, on whichever side the padding is."""
    first = (mask.cumsum(1) == 1) & (mask == 1)
    return (states * first.unsqueeze(-1).to(states.dtype)).sum(1)


def max_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).amax(1)


def reader_of(source: str, revision: str | None = None) -> Read:
    """Return a function that reads a file of a folder, or of a hub model, by its name."""
    folder = Path(source)

    def read(name: str) -> bytes | None:
        path = folder / name
        if not folder.is_dir():
            found = find_source_file(source, name, revision)
            return None if found is None else read_bytes(Path(found), limit=MAX_JSON, place=name)
        return read_bytes(path, limit=MAX_JSON) if os.path.lexists(path) else None

    return read


def side_files(source: str, read: Read) -> dict[str, bytes]:
    """Read the files of a source beside weights, config and tokenizer, at most one folder deep.

    Of a hub model only those that sentence-transformers reads.
    """
    folder, names = Path(source), [MODULES, SETTINGS, PROMPTS, POOLING]
    if folder.is_dir():
        paths = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths if path.suffix in (*SIDE_FILES, ".md")]
    contents = {name: read(name) for name in names if name not in NOT_CARRIED}
    return {name: content for name, content in contents.items() if content is not None}


def read_pooling(read: Read, place: str) -> Pooling:
    """Return how a folder pools, by its modules; mean and normalized where it is a plain encoder's.

    Raises:
        SqatError: modules, a pooling or settings that sqat does not know, or a file that is not there.
    """
    if (content := read(MODULES)) is None:
        if read(POOLING) is not None:
            raise SqatError(f"no such file, though {POOLING} is there", "get the model again", f"{place}/{MODULES}",
                            code="missing-file")  # fmt: skip
        return Pooling()
    paths = module_paths(parse_json(content, f"{place}/{MODULES}"), f"{place}/{MODULES}")
    check_settings(read, place)
    name = f"{paths['Pooling']}/config.json"
    if read(name) is None:
        raise SqatError(f"no such file, though {MODULES} names its folder", "get the model again", f"{place}/{name}",
                        code="missing-file")  # fmt: skip
    return Pooling(pooling_mode(read_object(read, name, place), f"{place}/{name}"), "Normalize" in paths)


def module_paths(modules: Any, place: str) -> dict[str, str]:
    """Return the folder of each module in modules.json, by the kind of module.

    Raises:
        SqatError: they are not those of a sentence encoder, or lie elsewhere.
    """
    entries = modules if isinstance(modules, list) else []
    if not entries or not all(isinstance(e, dict) and isinstance(e.get("type"), str) for e in entries):
        raise SqatError("is no list of modules with type and path", "get the model again", place,
                        code="unreadable-file")  # fmt: skip
    known = [module_kind(entry["type"]) for entry in entries]
    paths = [entry.get("path", "") for entry in entries]
    if known not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or paths[0] != "":
        where = f" in {paths[0]!r}" if paths[0] != "" else ""
        raise SqatError(f"the modules of the model are {', '.join(known)}{where}",
                        "sqat reads Transformer (beside modules.json), Pooling and Normalize of sentence-transformers",
                        place, code="unsupported-model")  # fmt: skip
    if not is_inside(paths[1]):
        raise SqatError(f"the path of Pooling is {paths[1]!r}, which is no folder inside the model's",
                        "get the model again", place, code="unsupported-model")  # fmt: skip
    return dict(zip(known, paths, strict=True))


def module_kind(path: str) -> str:
    """Return the class of a module of sentence-transformers; of another package, its whole path."""
    return path.rsplit(".", 1)[-1] if path.startswith("sentence_transformers.") else path


def is_inside(path: object) -> bool:
    """Say whether a path of modules.json is that of a folder below the model's."""
    if not isinstance(path, str) or not path.isprintable() or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def pooling_mode(config: Mapping[str, Any], place: str) -> str:
    """Return the one way of pooling of a Pooling module.

    Raises:
        SqatError: it has another, or several.
    """
    old = {key: value for key, value in config.items() if key.startswith("pooling_mode_")}
    if wrong := next((key for key, value in old.items() if not isinstance(value, bool)), None):
        raise SqatError(f"{wrong} is {old[wrong]!r}, not true or false", "get the model again", place,
                        code="unreadable-file")  # fmt: skip
    named = [OLD_MODES.get(key, key.removeprefix("pooling_mode_")) for key, value in old.items() if value]
    modes = config.get("pooling_mode", named or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLS:
        listed = " and ".join(map(str, modes)) if isinstance(modes, list) and modes else repr(modes)
        raise SqatError(f"the model pools by {listed}", f"sqat knows {', '.join(POOLS)}", place,
                        code="unsupported-model")  # fmt: skip
    return str(modes[0])


def check_settings(read: Read, place: str) -> None:
    """Refuse what would make sentence-transformers compute something else from the same text."""
    if read_object(read, SETTINGS, place).get("do_lower_case"):
        raise SqatError(f"{SETTINGS} says do_lower_case, which sqat does not do",
                        "let the tokenizer lower the case, or the data", place, code="unsupported-model")  # fmt: skip
    if prompt := read_object(read, PROMPTS, place).get("default_prompt_name"):
        raise SqatError(f"{PROMPTS} puts the prompt {prompt!r} before every text",
                        "write it into the data and set default_prompt_name to null", place,
                        code="unsupported-model")  # fmt: skip


def read_object(read: Read, name: str, place: str) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file.

    Raises:
        SqatError: it is something else.
    """
    where = f"{place}/{name}" if place else name
    content = read(name)
    value = {} if content is None else parse_json(content, where)
    if not isinstance(value, dict):
        raise SqatError("is no JSON object", "get the model again", where, code="unreadable-file")
    return value


NOT_CARRIED = ("config.json", "model.safetensors.index.json", "sqat.json", "recipe.yaml")
OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLS = {"mean": mean_of_tokens, "cls": first_token, "max": max_of_tokens}
