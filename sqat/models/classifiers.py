"""Classifiers of transformers: pretrained weights with a head for the task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from sqat.models.head import TaskHead, label_axes, settle_head_, source_labels
from sqat.models.source_files import CONFIG, header_of, shapes_on_meta
from sqat.models.sources import check_loaded, new_body_weights
from sqat.recipe.inputs import ModelConfig


def load_classifier(auto: Any, config: ModelConfig, source: str, head: TaskHead) -> PreTrainedModel:
    """Load a source with a head for the task: its own with aligned outputs, or a new one.

    Args:
        auto: AutoModelForSequenceClassification or its like.

    Raises:
        SqatError: weights that are not this model's, or labels that cannot be aligned.
    """
    header, place = header_of(source), str(Path(source) / CONFIG)
    options = {"revision": config.revision, "trust_remote_code": False}
    labels = source_labels(AutoConfig.from_pretrained(source, **options).to_dict(), source)
    settings = AutoConfig.from_pretrained(source, **options, **head.entries)
    settings.architectures = settings.architectures or []  # transformers iterates over them
    set_dropout(settings, config.dropout)
    shapes, larger = (shapes_on_meta(auto.from_config, each, header, place) for each in (settings, one_more(settings)))
    axes = label_axes(shapes, larger, settings.num_labels)
    model: PreTrainedModel
    model, report = auto.from_pretrained(
        source, config=settings, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True, **options,
    )  # fmt: skip
    check_loaded(new_body_weights(model.base_model_prefix, report), source)
    settle_head_(model, axes, config.head, labels, head, report)
    return model


def one_more(settings: Any) -> Any:
    """Return a copy of a config with one more output."""
    larger = copy.deepcopy(settings)
    larger.num_labels = settings.num_labels + 1
    return larger


def make_classifier(auto: Any, folder: Path) -> PreTrainedModel:
    """Make a classifier with random weights by the config in a folder."""
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model: PreTrainedModel = auto.from_config(settings, dtype=torch.float32)
    return model


def set_dropout(settings: Any, rate: float | None) -> None:
    """Set every dropout rate of a transformers config; families call them dropout or pdrop."""
    if rate is None:
        return
    for name, value in settings.to_dict().items():
        is_rate = "dropout" in name or name.endswith("pdrop")
        if is_rate and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(settings, name, rate)
