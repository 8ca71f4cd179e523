"""Models to checkpoints and back, whatever their architecture.

No model runs code that comes with it, and only safetensors are read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel as PreTrainedModel

from sqat.checkpoint.manifest import LAYOUT, WEIGHTS
from sqat.checkpoint.store import Checkpoint, layout_of
from sqat.compat import quiet_transformers
from sqat.data.batch import Processor
from sqat.errors import SqatError, first_line
from sqat.files.read import parse_json
from sqat.models.architectures import ARCHITECTURES, Architecture
from sqat.models.head import TaskHead, has_default_names, same_order, source_labels
from sqat.models.layer_selection import LinearOfConv1D, weighted_layers
from sqat.models.sources import LOADING_ERRORS, check_digest, resolve_source
from sqat.modules.batch_norm import fold_batch_norms_
from sqat.recipe.inputs import ModelConfig

DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"  # tells diffusers in which file the weights are


@quiet_transformers()
def load_pretrained(
    kind: str,
    config: ModelConfig,
    folder: Path,
    head: Mapping[str, Any],
    seed: int,
    *,
    is_trained: bool = True,
    needs_head: bool = False,
    key: str = "model.source",
    report: Callable[[str], None] = lambda line: None,
) -> tuple[nn.Module, Processor]:
    """Build the model that the recipe starts from, with a head for the task, and its processor.

    Args:
        kind: a key of `sqat.models.architectures`.
        folder: that relative sources start from.
        head: config entries of the head: num_labels, id2label, problem_type, ...
        seed: of the initial weights.
        is_trained: whether the head is trained on labels next.
        needs_head: whether the source must have a head for the task.
        key: of the recipe that names the source.
        report: receives a line about what becomes of the source's head.

    Raises:
        SqatError: no such model, one whose head has other labels, or one that the kind cannot take.
    """
    source = ""
    if config.source is not None:
        source = resolve_source(config.source, folder, key)
        check_digest(config, source)
    if config.text_encoder is not None and (folder / config.text_encoder).is_dir():
        config = config.model_copy(update={"text_encoder": str((folder / config.text_encoder).resolve())})
    if config.head != "by-name" and not head.get("num_labels"):
        raise SqatError(f"model.head is {config.head}, but the task has no head", "remove it", code="recipe-conflict")
    torch.manual_seed(seed)
    return ARCHITECTURES[kind].pretrained(config, source, TaskHead(head, is_trained, needs_head, report))


def architecture_of(folder: Path) -> Architecture:
    """Return the kind of model whose files lie in a folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return next(kind for kind in ARCHITECTURES.values() if kind.claims(names))


@quiet_transformers()
def serialize_model(model: nn.Module, processor: Processor) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """Return config and processor files, and weights; a tied weight is kept once, under its first name.

    The file `LAYOUT` names the linears that stand for a Conv1D, where there are any.
    """
    weights: dict[str, Tensor] = {}
    addresses: set[tuple[int, int, tuple[int, ...]]] = set()
    persistent = model.state_dict()
    for name, tensor in persistent.items():
        address = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and address in addresses:
            continue
        addresses.add(address)
        weights[name] = tensor.detach().cpu().clone()
    with tempfile.TemporaryDirectory() as scratch:
        save_config(model, Path(scratch))
        processor.save(Path(scratch))
        paths = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file()]
        files = {path.relative_to(scratch).as_posix(): path.read_bytes() for path in paths}
    if names := [name for name, module in model.named_modules() if isinstance(module, LinearOfConv1D)]:
        files[LAYOUT] = layout_of(names)
    return files, weights


def save_config(model: nn.Module, folder: Path) -> None:
    """Write config.json as transformers or diffusers does."""
    if isinstance(model, PreTrainedModel):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        save: Any = model.save_config
        save(folder)
        files = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), WEIGHTS)}
        (folder / DIFFUSERS_INDEX).write_text(json.dumps(files), encoding="utf-8")


def build(checkpoint: Checkpoint, place: str = "checkpoint") -> tuple[nn.Module, Processor]:
    """Return model and processor of a checkpoint; eval mode, batch norms folded where it is calibrated."""
    model, processor = assemble(checkpoint.files, place)
    load_weights(model, checkpoint.weights, place)
    if checkpoint.amax:
        fold_batch_norms_(model)
    return model, processor


@quiet_transformers()
def assemble(files: Mapping[str, bytes], place: str) -> tuple[nn.Module, Processor]:
    """Return model (random weights, eval mode) and processor by the files of a checkpoint."""
    with unpacked(files) as folder:
        kind = architecture_of(folder)
        model = make_model(kind, folder, place)
        return model.eval(), kind.processor(folder, place)


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write a checkpoint's files to a temporary folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        yield Path(scratch)


def make_model(kind: Architecture, folder: Path, place: str) -> nn.Module:
    """Make a model with random weights by the config in a folder.

    Raises:
        SqatError: the config cannot be read.
    """
    try:
        return kind.model(folder)
    except LOADING_ERRORS as error:
        raise SqatError(
            f"the checkpoint's model cannot be built: {first_line(error)}",
            "was it made by sqat?",
            place,
            code="unsupported-model",
        ) from error


@quiet_transformers()
def layer_names(checkpoint: Checkpoint, place: str = "checkpoint") -> list[str]:
    """Return the names of a checkpoint's linears and convolutions, in the model's order, by its config."""
    with unpacked(checkpoint.files) as folder, torch.device("meta"):
        return list(weighted_layers(make_model(architecture_of(folder), folder, place)))


@quiet_transformers()
def load_processor(folder: Path) -> Processor:
    """Load the processor (a tokenizer, for texts) in a folder."""
    return architecture_of(folder).processor(folder, str(folder))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Copy weights into a model; only tied names may be absent."""
    own = model.state_dict()
    wrong = [n for n, t in weights.items() if n in own and own[n].shape != t.shape]
    unknown = [name for name in weights if name not in own]
    if wrong or unknown:
        name = (wrong + unknown)[0]
        raise SqatError(
            f"the weight {name} does not fit the config",
            "the files do not belong together",
            place,
            code="model-mismatch",
        )
    model.load_state_dict(dict(weights), strict=False)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    loaded = {own[name].data_ptr() for name in weights}
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in loaded]
    if missing:
        raise SqatError(
            f"the weight {missing[0]} is missing", "the files do not belong together", place, code="model-mismatch"
        )


def versions() -> dict[str, str]:
    """Return the versions that decide what a model computes."""
    import sqat

    return {"sqat": sqat.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_head(config: bytes, outputs: int, fields: Mapping[str, Any], place: str) -> None:
    """Refuse a model whose head is not the task's: another number of outputs, or other labels in another order.

    Args:
        config: content of the model's config.json.
        outputs: logits the task expects; 0 where the model has no head.
        fields: the task's entries of the config; ``id2label`` is compared where it is given.
    """
    if outputs == 0:
        return
    parsed = parse_json(config, place)
    if not isinstance(parsed, dict):
        raise SqatError("its config.json is no JSON object", "export it again", place, code="unreadable-file")
    labels, expected = source_labels(parsed, place), tuple(fields.get("id2label", {}).values())
    # One output has no order; outputs without names are those of numbered labels.
    named = outputs > 1 or not has_default_names(labels)
    if len(labels) != outputs or (expected and named and not same_order(labels, expected)):
        raise SqatError(f"the model's outputs are {', '.join(labels)}, but the recipe's task has "
                        f"{', '.join(expected) or outputs}", "use the recipe it was trained with", place,
                        code="model-mismatch")  # fmt: skip
