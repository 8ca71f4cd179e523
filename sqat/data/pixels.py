"""Pixels to what an image model reads: scaled to 0..1, normalized, channels first; augmented while it trains.

A prepared row holds its pixels as bytes, channels last: one byte a value for uint8, four for float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.errors import SqatError

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageProcessor:
    """Scales pixels to 0..1 and normalises them, as transformers' image processors do.

    Attributes:
        height: of every image, likewise width and channels.
        mean: of a channel, taken off after scaling; std divides.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        """Add ``length``; only the first row is checked, since all rows of a split have one size.

        Raises:
            SqatError: the images have another size or other channels than the model reads.
        """
        row = rows.select_columns(["height", "width", "channels", "place"])[0]
        sizes = [row[name] for name in ("height", "width", "channels")]
        if sizes != [self.height, self.width, self.channels]:
            problem = "the image is {} x {} with {} channels".format(*sizes)
            problem += f", the model reads {self.height} x {self.width} with {self.channels}"
            hint = "set image_size and num_channels in model.config, or bring the images to that size"
            raise SqatError(problem, hint, row["place"], code="invalid-data")
        return rows.add_column("length", np.ones(len(rows), np.int32))

    def collate(self, rows: Rows, indices: list[int]) -> Batch:
        picked = rows[indices]
        size = (len(indices), self.height, self.width, self.channels)
        data = b"".join(picked["pixels"])
        whole = len(data) == np.prod(size)
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8 if whole else torch.float32).view(size)
        scaled = pixels.float() / 255 if whole else pixels
        normal = (scaled - torch.tensor(self.mean)) / torch.tensor(self.std)
        labels = torch.tensor(picked["label"], dtype=torch.int64)
        inputs = {"pixel_values": normal.permute(0, 3, 1, 2).contiguous()}
        return Batch(inputs, labels, torch.full((len(indices),), -1, dtype=torch.int64))

    def save(self, folder: Path) -> None:
        """Write the file that transformers' AutoImageProcessor reads."""
        entries = {"image_processor_type": "ViTImageProcessor", "do_resize": False,
                   "size": {"height": self.height, "width": self.width}, "do_rescale": True,
                   "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": self.mean,
                   "image_std": self.std}  # fmt: skip
        (folder / PREPROCESSOR).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def augment_images(batch: Batch, shift: int, flip: bool) -> Batch:
    """Shift each image by up to ``shift`` pixels both ways, edges repeated, and mirror half of them."""
    images = batch.inputs["pixel_values"]
    count, _, height, width = images.shape
    down, right = torch.randint(-shift, shift + 1, (2, count, 1))
    rows = (torch.arange(height) + down).clamp_(0, height - 1)
    columns = (torch.arange(width) + right).clamp_(0, width - 1)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    moved: Tensor = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    inputs = {**batch.inputs, "pixel_values": moved.permute(0, 3, 1, 2).contiguous()}
    return replace(batch, inputs=inputs)
