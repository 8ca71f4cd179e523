"""Sentence encoders: checkpoints of sentence-transformers in and out, tokens pooled to one vector.

Its modules Transformer, Pooling (mean, cls or max) and Normalize are read and written; a source without
``modules.json`` gets mean pooling and normalization. Pooling is a forward hook, so weights keep AutoModel's names and
``SentenceTransformer(checkpoint)`` loads what sqat writes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from sqat.checkpoint.manifest import SIDE_FILES
from sqat.compat import find_source_file
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError, first_line
from sqat.models.sources import LOADING_ERRORS, check_loaded
from sqat.models.text import check_length, check_vocabulary, load_tokenizer, set_dropout
from sqat.recipe.inputs import ModelConfig

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING, NORMALIZE = "1_Pooling/config.json", "2_Normalize/config.json"


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


@dataclass(frozen=True)
class SentenceProcessor(TextProcessor):
    """A tokenizer, and what else lies in a sentence-transformers folder.

    Attributes:
        width: of an embedding, H.
        max_length: tokens that a text is cut to by whoever loads the folder.
        carried: other files of the source by name, as they were.
    """

    pooling: Pooling
    width: int
    max_length: int
    carried: Mapping[str, bytes]

    def save(self, folder: Path) -> None:
        """Write a folder that `SentenceTransformer` loads, in the form that its old versions read too."""
        self.tokenizer.save_pretrained(folder)
        settings = parse_json(self.carried.get(SETTINGS, b"{}"), SETTINGS)
        modes = {key: mode == self.pooling.mode for key, mode in OLD_MODES.items() if mode in POOLS}
        settings_files = {
            MODULES: module_list(self.pooling.normalized),
            SETTINGS: {**settings, "max_seq_length": self.max_length, "do_lower_case": False},
            POOLING: {"word_embedding_dimension": self.width, **modes},
        }
        if self.pooling.normalized:
            settings_files[NORMALIZE] = {}
        contents = {name: f"{json.dumps(value, indent=2)}\n".encode() for name, value in settings_files.items()}
        for name, content in {**self.carried, **contents}.items():
            path = folder / name
            if name in contents or not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)


def module_list(normalized: bool) -> list[dict[str, Any]]:
    """Content of modules.json."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if normalized else {})}
    return [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(paths.items())
    ]


class Sentences:
    """Models of transformers' AutoModel with pooling."""

    output = "sentence_embedding"

    def claims(self, files: Collection[str]) -> bool:
        return MODULES in files

    def pretrained(
        self, config: ModelConfig, source: str, head: Mapping[str, Any]
    ) -> tuple[PreTrainedModel, SentenceProcessor]:
        """The encoder of the source, pooled its way or the recipe's (``head["pooling"]``).

        Raises:
            SqatError: no such model, modules or a pooling that sqat does not know, weights that are not this
                encoder's, no tokenizer, or texts longer than the model reads.
        """
        options = {"revision": config.revision, "trust_remote_code": False}
        try:
            settings = AutoConfig.from_pretrained(source, **options)
            set_dropout(settings, config.dropout)
            model, report = AutoModel.from_pretrained(
                source, config=settings, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            carried = side_files(source, config.revision)
        except LOADING_ERRORS as error:
            raise SqatError(
                f"the model {config.source!r} cannot be loaded: {first_line(error)}",
                "check model.source",
                code="unsupported-model",
            ) from error
        new = [name for name in sorted(report["missing_keys"]) if not name.startswith("pooler.")]  # nothing reads it
        check_loaded(new, source)
        check_vocabulary(tokenizer, source)
        check_length(model, config.max_length)
        pooling = read_pooling(carried, source)
        pooling = Pooling(head.get("pooling", pooling.mode), pooling.normalized)
        return add_pooling_(model, pooling), SentenceProcessor(
            tokenizer, pooling, model.config.hidden_size, config.max_length, carried
        )

    def model(self, folder: Path) -> PreTrainedModel:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: PreTrainedModel = AutoModel.from_config(settings, dtype=torch.float32)
        return add_pooling_(model, read_pooling(side_files(str(folder), None), str(folder)))

    def processor(self, folder: Path, place: str) -> SentenceProcessor:
        carried = side_files(str(folder), None)
        width = AutoConfig.from_pretrained(folder, trust_remote_code=False).hidden_size
        longest = parse_json(carried.get(SETTINGS, b"{}"), place).get("max_seq_length")
        tokenizer = load_tokenizer(folder, place)
        return SentenceProcessor(
            tokenizer, read_pooling(carried, place), width, longest or tokenizer.model_max_length, carried
        )


def add_pooling_(model: PreTrainedModel, pooling: Pooling) -> PreTrainedModel:
    """Hook the pooling to a model; a pooler of its own is frozen, since nothing reads it."""
    model.register_forward_hook(pooling, with_kwargs=True)
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)
    return model


def side_files(source: str, revision: str | None) -> dict[str, bytes]:
    """Read the files of a source beside weights, config and tokenizer, at most one folder deep.

    Of a hub model only those that sentence-transformers reads.
    """
    folder = Path(source)
    if folder.is_dir():
        paths = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths if path.suffix in (*SIDE_FILES, ".md")]
        return {name: (folder / name).read_bytes() for name in names if name not in NOT_CARRIED}
    found = {name: find_source_file(source, name, revision) for name in (MODULES, SETTINGS, PROMPTS, POOLING)}
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}


def read_pooling(files: Mapping[str, bytes], place: str) -> Pooling:
    """Return how a folder pools, by its modules; mean and normalized where there is no ``modules.json``.

    Raises:
        SqatError: modules, a pooling or settings that sqat does not know.
    """
    if MODULES not in files:
        return Pooling()
    modules: Any = parse_json(files[MODULES], place)
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
        where = f" in {modules[0]['path']}" if modules and modules[0]["path"] else ""
        raise SqatError(f"the modules of the model are {', '.join(kinds) or 'none'}{where}",
                        "sqat reads Transformer (beside modules.json), Pooling and Normalize", place,
                        code="unsupported-model")  # fmt: skip
    check_settings(files, place)
    config = parse_json(files.get(f"{modules[1]['path']}/config.json", b"{}"), place)
    modes = config.get("pooling_mode") or [mode for key, mode in OLD_MODES.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLS:
        raise SqatError(
            f"the model pools by {' and '.join(modes)}",
            f"sqat knows {', '.join(POOLS)}",
            place,
            code="unsupported-model",
        )
    return Pooling(modes[0], len(kinds) > len(("Transformer", "Pooling")))


def check_settings(files: Mapping[str, bytes], place: str) -> None:
    """Refuse what would make sentence-transformers compute something else from the same text."""
    if parse_json(files.get(SETTINGS, b"{}"), place).get("do_lower_case"):
        raise SqatError(f"{SETTINGS} says do_lower_case, which sqat does not do",
                        "let the tokenizer lower the case, or the data", place, code="unsupported-model")  # fmt: skip
    if prompt := parse_json(files.get(PROMPTS, b"{}"), place).get("default_prompt_name"):
        raise SqatError(f"{PROMPTS} puts the prompt {prompt!r} before every text",
                        "write it into the data and set default_prompt_name to null", place,
                        code="unsupported-model")  # fmt: skip


def parse_json(content: bytes, place: str) -> Any:
    """Parse a JSON file of the source.

    Raises:
        SqatError: it is none.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        problem = f"a file of the sentence encoder is not JSON ({error})"
        raise SqatError(problem, "get the model again", place, code="unreadable-file") from error


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
