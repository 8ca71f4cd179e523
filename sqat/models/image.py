"""Image classifiers, convolutional or transformers, and the scaling of their pixels.

A model starts from a source, or from a config of transformers with random weights. The size of its images is the
config's ``image_size``, else that of the source's preprocessor. Images must have that size; nothing is resized.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from sqat.data.pixels import PREPROCESSOR, ImageProcessor
from sqat.errors import SqatError, first_line
from sqat.files.read import read_json
from sqat.models.classifiers import load_classifier, make_classifier, set_dropout
from sqat.models.head import TaskHead
from sqat.models.source_files import shapes_on_meta
from sqat.models.sources import LOADING_ERRORS
from sqat.recipe.inputs import ModelConfig

MIDDLE = 0.5
MAX_SIDE = 8192


class Images:
    """Models of transformers' AutoModelForImageClassification."""

    output = "logits"

    def claims(self, files: Collection[str]) -> bool:
        return PREPROCESSOR in files

    def pretrained(self, config: ModelConfig, source: str, head: TaskHead) -> tuple[PreTrainedModel, ImageProcessor]:
        """Return the source's model with a head for the task, or a random one, and the scaling of its pixels.

        Raises:
            SqatError: no such model or configuration, weights that are not this model's (a head of another size
                starts new), a head of other labels, or no size of image.
        """
        try:
            if config.config is not None:
                model, processor = from_config(config.config, config.dropout, head.entries)
            else:
                model, processor = from_source(config, source, head)
        except ImportError as error:
            if error.name not in ("PIL", None) and "PIL" not in str(error):
                raise SqatError(f"the model {config.source!r} cannot be built: {first_line(error)}", "install it",
                                code="missing-package") from error  # fmt: skip
            raise SqatError(
                "an image model's preprocessor needs Pillow", "pip install 'sqat[images]'", code="missing-package"
            ) from error
        except LOADING_ERRORS as error:
            what = "of model.config" if config.config is not None else repr(config.source)
            raise SqatError(
                f"the model {what} cannot be built: {first_line(error)}",
                "it must be an image classifier",
                code="unsupported-model",
            ) from error
        check_image(model, processor, source or "model.config")
        return model, processor

    def model(self, folder: Path) -> PreTrainedModel:
        return make_classifier(AutoModelForImageClassification, folder)

    def processor(self, folder: Path, place: str) -> ImageProcessor:
        try:
            entries = read_json(folder / PREPROCESSOR, place=place)
            size = entries["size"]
            return ImageProcessor(size["height"], size["width"], tuple(entries["image_mean"]),
                                  tuple(entries["image_std"]))  # fmt: skip
        except (SqatError, ValueError, KeyError, TypeError) as error:
            raise SqatError(f"no sound {PREPROCESSOR} lies beside the model", "keep its files together",
                            place, code="model-mismatch") from error  # fmt: skip


def from_config(
    entries: Mapping[str, Any], dropout: float | None, head: Mapping[str, Any]
) -> tuple[PreTrainedModel, ImageProcessor]:
    """Make a model with random weights by the entries of its config.json."""
    if "model_type" not in entries:
        raise SqatError(
            "model.config has no model_type",
            "e.g. {model_type: resnet, image_size: 32, num_channels: 3}",
            code="invalid-recipe",
        )
    settings = AutoConfig.for_model(**{"architectures": [], **entries, **head})
    set_dropout(settings, dropout)
    shapes_on_meta(AutoModelForImageClassification.from_config, settings, None, "model.config")
    model: PreTrainedModel = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
    height, width = image_size(settings.to_dict())
    middle = (MIDDLE,) * channels(settings.to_dict())
    return model, ImageProcessor(height, width, middle, middle)


def from_source(config: ModelConfig, source: str, head: TaskHead) -> tuple[PreTrainedModel, ImageProcessor]:
    """Load a model with a head for the task, and the mean and deviation of its pixels."""
    model = load_classifier(AutoModelForImageClassification, config, source, head)
    scaling = AutoImageProcessor.from_pretrained(source, revision=config.revision, trust_remote_code=False).to_dict()
    height, width = image_size(model.config.to_dict() | scaling_size(scaling))
    count = channels(model.config.to_dict())
    mean, deviation = (channel_values(scaling, name, count, source) for name in ("image_mean", "image_std"))
    return model, ImageProcessor(height, width, mean, deviation)


def channel_values(scaling: Mapping[str, Any], name: str, count: int, source: str) -> tuple[float, ...]:
    """Return a preprocessor's mean or deviation of each channel; a half where it has none.

    Raises:
        SqatError: it has other channels than the model, or no numbers.
    """
    values = scaling.get(name) or [MIDDLE] * count
    values = list(values) if isinstance(values, list | tuple) else [values] * count
    sound = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if not sound or len(values) != count or (name == "image_std" and not all(values)):
        raise SqatError(f"{name} is {values}, and the model's images have {count} channels", "give each channel one "
                        "number, for image_std not 0", f"{source}/{PREPROCESSOR}", code="model-mismatch")  # fmt: skip
    return tuple(map(float, values))


def check_image(model: PreTrainedModel, processor: ImageProcessor, place: str) -> None:
    """Show the model an empty image of the processor's size.

    Raises:
        SqatError: the model does not take it.
    """
    height, width, training = processor.height, processor.width, model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, processor.channels, height, width))
    except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
        problem = f"the model does not read images of {height} x {width} with {processor.channels} channels"
        raise SqatError(f"{problem}: {first_line(error)}", f"make image_size of its config and the size in "
                        f"{PREPROCESSOR} fit", place, code="model-mismatch") from error  # fmt: skip
    finally:
        model.train(training)


def image_size(entries: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width by a config's ``image_size``."""
    size = entries.get("image_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise SqatError(
            "nothing says how large the model's images are", "give model.config an image_size", code="invalid-recipe"
        )
    height, width = sides
    if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise SqatError(f"the model's images are {height!r} x {width!r}", f"a side has 1 to {MAX_SIDE} pixels",
                        code="unsupported-model")  # fmt: skip
    return height, width


def scaling_size(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``image_size`` by a preprocessor, that of cropping or of resizing; empty where there is none."""
    for size in (entries.get("crop_size"), entries.get("size")):
        if size and size.get("height"):
            return {"image_size": [size["height"], size["width"]]}
        if size and size.get("shortest_edge"):
            return {"image_size": size["shortest_edge"]}
    return {}


def channels(entries: Mapping[str, Any]) -> int:
    """Return the number of channels; three where the config does not say."""
    return int(entries.get("num_channels") or len("RGB"))
