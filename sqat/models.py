"""Pretrained models: where they come from and how they turn into checkpoints and back.

The only transformers import. No model is built by code that comes with it, and only safetensors are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedModel as PreTrainedModel  # re-exported: nothing else imports transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sqat.checkpoint import WEIGHTS, Checkpoint
from sqat.errors import SqatError
from sqat.insertion.attention import tapped_attention
from sqat.layers import linear_layers
from sqat.recipe import ModelConfig

TAPPED = "sqat_tapped"
ALL_ATTENTION_FUNCTIONS.register(TAPPED, tapped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TAPPED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def resolve_source(config: ModelConfig, folder: Path) -> str:
    """Folder or hub name of a model source; ``package:NAME/FOLDER`` is found without importing the package."""
    source = config.source
    if source.startswith("package:"):
        return package_folder(source.removeprefix("package:"), source)
    local = folder / source
    if local.is_dir():
        return str(local)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise SqatError(f"model.source is {source!r}, but there is no such folder", f"looked at {local}")
    return source


def package_folder(reference: str, source: str) -> str:
    """Folder inside an installed package."""
    name, _, inner = reference.partition("/")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise SqatError(
            f"model.source is {source!r}, but no package {name!r} is installed",
            f"pip install {name.replace('_', '-')}, or name a folder or a hub model",
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = (root / inner).resolve()
    if not found.is_relative_to(root) or not (found / "config.json").is_file():
        raise SqatError(
            f"model.source is {source!r}, but that folder of the package holds no model", f"looked at {found}"
        )
    return str(found)


def source_digest(config: ModelConfig, folder: Path) -> str:
    """sha256 over the files of a local model; a hub model is known by name and revision, which the recipe says."""
    source = Path(resolve_source(config, folder))
    hasher = hashlib.sha256()
    for path in sorted(source.glob("*")) if source.is_dir() else ():
        if path.suffix in (".json", ".txt", ".model", ".safetensors"):
            hasher.update(f"{path.name} {file_digest(path)}\n".encode())
    return hasher.hexdigest()


def load_pretrained(
    config: ModelConfig, folder: Path, head: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, Any]:
    """Build the pretrained encoder with a fresh head, and its tokenizer.

    Args:
        folder: what relative sources are relative to.
        head: config entries of the head: num_labels, id2label, problem_type, ...
        seed: of the head's initial weights.

    Raises:
        SqatError: no such model, one that needs its own code or has no safetensors, no tokenizer, weights that are
            not this encoder's (a head of another size is replaced), or texts longer than the model reads.
    """
    source = resolve_source(config, folder)
    check_digest(config, source)
    known = {"revision": config.revision, "trust_remote_code": False}
    try:
        settings = AutoConfig.from_pretrained(source, **known, **head)
        set_dropout(settings, config.dropout)
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=settings,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **known,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **known)
    except LOADING as error:
        raise SqatError(
            f"the model {config.source!r} cannot be loaded: {first_line(error)}", "check model.source"
        ) from error
    check_encoder(model, report, config.source)
    check_vocabulary(tokenizer, config.source)
    longest = longest_text(model)
    if longest is not None and config.max_length > longest:
        raise SqatError(f"model.max_length is {config.max_length}, but the model has {longest} positions", "lower it")
    return model, tokenizer


LOADING = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def first_line(error: Exception) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_encoder(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Refuse an encoder that kept some of its random weights; only the pooler and the head may be new."""
    new = [*sorted(report["missing_keys"]), *(name for name, *_ in report["mismatched_keys"])]
    inside = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if inside:
        raise SqatError(f"the weights of {source!r} are not those its config.json describes: {len(inside)} are missing "
                        f"or of another shape, the first is {inside[0]}", "check model.source")  # fmt: skip


def check_vocabulary(tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer without words, which is what transformers makes of a folder that holds none."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise SqatError("no tokenizer lies beside the model", "keep its files together", place)


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens the model has positions for; RoBERTa and its like start after their padding index."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)  # absent where positions are relative
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    if longest is None or table is None or table.padding_idx is None:
        return longest
    return longest - table.padding_idx - 1


def check_digest(config: ModelConfig, source: str) -> None:
    """Compare the sha256 of the weights file with the recipe's, where it gives one."""
    if config.sha256 is None:
        return
    path = Path(source) / WEIGHTS
    if not path.is_file():
        raise SqatError(
            "model.sha256 is given, but the source has no local model.safetensors", "drop it or use a folder"
        )
    digest = file_digest(path)
    if digest != config.sha256:
        raise SqatError(f"model.safetensors has sha256 {digest}, but the recipe says {config.sha256}",
                        "use the version the recipe was made for", str(path))  # fmt: skip


def file_digest(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def set_dropout(settings: Any, rate: float | None) -> None:
    """Replace every dropout rate of a transformers config; families name them differently, but all say dropout."""
    if rate is None:
        return
    for name, value in settings.to_dict().items():
        if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(settings, name, rate)


def capture(model: PreTrainedModel, tokenizer: Any) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """Config and tokenizer files, and plain weights; a tied weight is kept once, under its first name."""
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    persistent = model.state_dict()
    for name, tensor in persistent.items():
        address = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and address in seen:
            continue
        seen.add(address)
        weights[name] = tensor.detach().cpu().clone()
    with tempfile.TemporaryDirectory() as scratch:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}
    return files, weights


def build(checkpoint: Checkpoint, place: str = "checkpoint") -> tuple[PreTrainedModel, Any]:
    """Model (plain weights, eval mode) and tokenizer of a checkpoint."""
    model, tokenizer = assemble(checkpoint.files, place)
    load_weights(model, checkpoint.weights, place)
    return model, tokenizer


def assemble(files: Mapping[str, bytes], place: str) -> tuple[PreTrainedModel, Any]:
    """Model (random weights, eval mode) and tokenizer by the config and tokenizer files of a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        try:
            settings = AutoConfig.from_pretrained(scratch, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
        except LOADING as error:
            raise SqatError(
                f"the checkpoint's model cannot be built: {first_line(error)}", "was it made by sqat?", place
            ) from error
    check_vocabulary(tokenizer, place)
    return model.eval(), tokenizer


def linear_names(checkpoint: Checkpoint, place: str = "checkpoint") -> list[str]:
    """Names of a checkpoint's linears in the model's order, from its config alone."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_bytes(checkpoint.files.get("config.json", b""))
        try:
            settings = AutoConfig.from_pretrained(scratch, trust_remote_code=False)
            with torch.device("meta"):
                return list(linear_layers(AutoModelForSequenceClassification.from_config(settings)))
        except LOADING as error:
            raise SqatError(
                f"the checkpoint's model cannot be built: {first_line(error)}", "was it made by sqat?", place
            ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except LOADING as error:
        raise SqatError("no tokenizer lies beside the model", "keep its files together", str(folder)) from error
    check_vocabulary(tokenizer, str(folder))
    return tokenizer


def load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], place: str) -> None:
    """Copy weights into a model; only tied names may be absent."""
    own = model.state_dict()
    wrong = [n for n, t in weights.items() if n in own and own[n].shape != t.shape]
    unknown = [name for name in weights if name not in own]
    if wrong or unknown:
        name = (wrong + unknown)[0]
        raise SqatError(f"the weight {name} does not fit the config", "the files do not belong together", place)
    model.load_state_dict(dict(weights), strict=False)
    model.tie_weights()
    loaded = {own[name].data_ptr() for name in weights}
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in loaded]
    if missing:
        raise SqatError(f"the weight {missing[0]} is missing", "the files do not belong together", place)


def use_taps(model: PreTrainedModel) -> bool:
    """Switch to the tapped attention; False where the family does not go through the attention interface."""
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(TAPPED)
    return True


def use_eager(model: PreTrainedModel) -> None:
    """Switch to eager attention, for the exporter."""
    model.set_attn_implementation("eager")


# Not query_key_value or in_proj: those families (BLOOM, DeBERTa v1) put q, k and v side by side head by head.


def attention_heads(model: PreTrainedModel) -> int:
    """Number of attention heads, from the config (every transformers config maps its own name to this one)."""
    return int(model.config.num_attention_heads)


def versions() -> dict[str, str]:
    """Versions that decide what a model computes."""
    import sqat

    return {"sqat": sqat.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_head(config: bytes, outputs: int, fields: Mapping[str, Any], place: str) -> None:
    """Refuse a model whose head is not the task's: another number of outputs, or other labels in another order.

    Args:
        config: content of the model's config.json.
        outputs: logits the task expects.
        fields: the task's entries of the config; ``id2label`` is compared where it is given.
    """
    parsed: dict[str, Any] = json.loads(config)
    found = [label for _, label in sorted(parsed.get("id2label", {}).items(), key=lambda item: int(item[0]))]
    wanted = [label for _, label in sorted(fields.get("id2label", {}).items())]
    count = len(found) or 2  # transformers leaves out the default of two outputs
    if count != outputs or (wanted and found and found != wanted):
        raise SqatError(f"the model's outputs are {', '.join(found) or count}, but the recipe's task has "
                        f"{', '.join(wanted) or outputs}", "use the recipe it was trained with", place)  # fmt: skip
