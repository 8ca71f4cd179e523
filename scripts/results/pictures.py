"""Draw the same captions from the same noise with each result of a text-to-image recipe.

    python scripts/results/pictures.py recipes/text-to-image.yaml [--rows LABEL LABEL] [--set NAME=VALUE]

Writes RECIPE.png, the first row's pictures above the last row's, under captions of train and captions that no model
has seen, and RECIPE.pictures.json with the figures.
"""

# frechet: Frechet distance between normal distributions of features of real train pictures and of drawn ones. Features
#   are principal components of pixels at half size and of edge energy in cells of 4 x 4, not of an Inception network:
#   compare them only with each other and with real test pictures.
# recall@10: how often the caption is among the ten nearest of all captions, by a ridge regression from the features to
#   the text encoder's mean state; beside it real pictures, and drawn ones in another order (chance).
# difference: root mean square of pixels, of 255, to the first row's pictures; beside it two noises, and two captions.

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sqat.checkpoint.store import load_checkpoint
from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.evaluation.artifacts import config_of, open_artifact
from sqat.evaluation.inference import logits_of
from sqat.models.diffusion import floats
from sqat.models.loading import build, load_processor
from sqat.models.rectified_flow import Forward, captioned, pixels, seeded_noise, signals, walk
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.result_files import result_artifacts
from sqat.recipe.loader import load_recipe
from sqat.tasks.splits import Splits

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
COMPONENTS, NEAREST, RIDGE = 48, 10, 100.0
SCALE, GAP, LABEL = 3, 6, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--rows", nargs="+", help="results to draw with; the first is the one the others are compared to"
    )
    parser.add_argument("--count", type=int, default=128, help="captions of train and of test that are drawn")
    parser.add_argument("--shown", type=int, default=10, help="captions of each that the picture shows")
    parser.add_argument("--seed", type=int, default=0, help="chooses the captions and the noise")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--output", type=Path, help="folder of the two files; default: the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    loaded = load_recipe(given.recipe, given.set)
    found = {label: path for label, (_, path) in result_artifacts(resolve_graph(loaded)).items()}
    artifacts = {label: found[label] for label in given.rows or found if found[label].exists()}
    splits = Splits(loaded.recipe, loaded.path.parent)
    processor = load_processor(config_of(next(iter(artifacts.values()))).parent)
    train = Part.of(splits.prepared("train", processor), "train", len(splits.rows("train")), given.seed)
    parts = [Part.of(splits.prepared(name, processor), name, given.count, given.seed) for name in ("train", "test")]
    judge = Judge.of(train)
    drawing = Drawing(given.steps, given.guidance, given.seed)
    drawn = {label: [drawing.pictures(open_forward(path), part) for part in parts] for label, path in artifacts.items()}
    first = next(iter(artifacts.values()))
    again = [Drawing(given.steps, given.guidance, given.seed + 1).pictures(open_forward(first), part) for part in parts]
    figures: dict[str, float] = {}
    for index, part in enumerate(parts):
        rows = {label: pictures[index] for label, pictures in drawn.items()}
        figures |= {f"{part.name}: {name}": value for name, value in compare(judge, part, rows, again[index]).items()}
    folder = given.output or given.recipe.parent
    picture = folder / f"{given.recipe.stem}.png"
    shown = [next(iter(drawn.values())), next(reversed(drawn.values()))]
    names = [next(iter(drawn)), next(reversed(drawn))]
    grid(parts, shown, names, given.shown).save(picture)
    record = {"file": picture.name, "figures": figures}
    (folder / f"{given.recipe.stem}.pictures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value:.4g}" for name, value in figures.items()))


@dataclass(frozen=True)
class Part:
    """Some captions of a split: the texts, what the text encoder makes of them, and their real pictures."""

    name: str
    captions: list[str]
    states: Tensor
    mask: Tensor
    real: Pixels

    @classmethod
    def of(cls, rows: Rows, name: str, count: int, seed: int) -> Part:
        """``count`` rows of a split, chosen by a seed."""
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        some = rows.select(chosen)[:]
        tokens = len(some["mask"][0]) // 4
        states, mask = (floats(some[key], (len(chosen), tokens, -1)) for key in ("states", "mask"))
        return cls(name, some["text"], states, mask.squeeze(2), pixels(signals(some)).numpy())

    @property
    def embeddings(self) -> Floats:
        """Mean state [N,E] of each caption."""
        summed = (self.states * self.mask[..., None]).sum(dim=1) / self.mask.sum(dim=1, keepdim=True)
        return summed.double().numpy()


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; the noise of a caption is that of its number and the seed."""

    steps: int
    guidance: float
    seed: int

    def pictures(self, forward: Forward, part: Part) -> Pixels:
        """One picture [N,H,W,3] of each caption."""
        seeds = [self.seed * 1_000_003 + number for number in range(len(part.captions))]
        noise = seeded_noise(seeds, (3, *part.real.shape[1:3]))
        with torch.no_grad():
            parts = [
                walk(captioned(forward, states, mask, self.guidance), some, self.steps, "euler")
                for states, mask, some in zip(part.states.split(32), part.mask.split(32), noise.split(32), strict=True)
            ]
        return pixels(torch.cat(parts)).numpy()


def open_forward(artifact: Path) -> Forward:
    """What an ONNX file, or a checkpoint, draws for inputs by name."""
    if artifact.suffix == ".onnx":
        run = open_artifact(artifact)
        return lambda inputs: run(Batch(dict(inputs), torch.empty(0), torch.empty(0)))
    model, _ = build(load_checkpoint(artifact))
    return lambda inputs: logits_of(model, Batch(dict(inputs), torch.empty(0), torch.empty(0)))


@dataclass(frozen=True)
class Judge:
    """Features and what was fitted to the train pictures: components, their distribution, a regression to captions."""

    mean: Floats
    components: Floats
    real: Floats
    regression: Floats

    @classmethod
    def of(cls, train: Part) -> Judge:
        raw = raw_features(train.real)
        mean = raw.mean(axis=0)
        _, _, axes = np.linalg.svd(raw - mean, full_matrices=False)
        components = axes[:COMPONENTS].T
        features = (raw - mean) @ components
        white = np.c_[features / features.std(axis=0), np.ones(len(features))]
        regression = np.linalg.solve(white.T @ white + RIDGE * np.eye(white.shape[1]), white.T @ train.embeddings)
        return cls(mean, components, features, regression)

    def features(self, pictures: Pixels) -> Floats:
        """Principal components [N,48] of pictures."""
        components: Floats = (raw_features(pictures) - self.mean) @ self.components
        return components

    def frechet(self, pictures: Pixels) -> float:
        """Frechet distance to the train pictures."""
        one, other = self.real, self.features(pictures)
        spread, found = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
        root = np.sqrt(np.clip(np.linalg.eigvals(spread @ found).real, 0, None)).sum()
        apart = ((one.mean(axis=0) - other.mean(axis=0)) ** 2).sum()
        return float(apart + np.trace(spread) + np.trace(found) - 2 * root)

    def recall(self, pictures: Pixels, embeddings: Floats) -> float:
        """Share of pictures whose own caption is among the nearest ten."""
        white = np.c_[self.features(pictures) / self.real.std(axis=0), np.ones(len(pictures))]
        guessed, known = (each - embeddings.mean(axis=0) for each in (white @ self.regression, embeddings))
        near = unit(guessed) @ unit(known).T
        rank = (near > np.diag(near)[:, None]).sum(axis=1)
        return float((rank < NEAREST).mean())


def unit(vectors: Floats) -> Floats:
    """Rows of length 1."""
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def raw_features(pictures: Pixels) -> Floats:
    """Pixels at half size and edges in cells of 4 x 4, one row a picture."""
    light = pictures.astype(np.float64) / 255
    count, side = light.shape[:2]
    half = light.reshape(count, side // 2, 2, side // 2, 2, 3).mean(axis=(2, 4))
    grey = light.mean(axis=3)
    edges = [np.abs(np.diff(grey, axis=axis, append=np.take(grey, [-1], axis=axis))) for axis in (1, 2)]
    cells = [edge.reshape(count, side // 4, 4, side // 4, 4).mean(axis=(2, 4)) for edge in edges]
    return np.concatenate([half.reshape(count, -1), *(4 * cell.reshape(count, -1) for cell in cells)], axis=1)


def compare(judge: Judge, part: Part, rows: Mapping[str, Pixels], again: Pixels) -> dict[str, float]:
    """All figures of the pictures of one split."""
    first = next(iter(rows.values()))
    figures = {"frechet of real pictures": judge.frechet(part.real),
               "recall@10 of real pictures": judge.recall(part.real, part.embeddings),
               "recall@10 by chance": judge.recall(np.roll(first, 1, axis=0), part.embeddings)}  # fmt: skip
    for label, pictures in rows.items():
        figures[f"frechet of {label}"] = judge.frechet(pictures)
        figures[f"recall@10 of {label}"] = judge.recall(pictures, part.embeddings)
        figures[f"difference of {label} to the real pictures"] = difference(pictures, part.real)
        if pictures is not first:
            figures[f"difference of {label}"] = difference(pictures, first)
    figures["difference between two noises"] = difference(first, again)
    figures["difference between two captions"] = difference(first, np.roll(first, 1, axis=0))
    return figures


def difference(one: Pixels, other: Pixels) -> float:
    """Root mean square difference of pixels, of 255."""
    return float(np.sqrt(((one.astype(np.float64) - other) ** 2).mean()))


def grid(parts: list[Part], drawn: list[list[Pixels]], names: list[str], shown: int) -> Image.Image:
    """Captions of train, then of test, and under each the pictures of the first and of the last row."""
    side = drawn[0][0].shape[1] * SCALE
    width, block = 150 + shown * (side + GAP), LABEL + 2 * (side + GAP) + 22
    canvas = Image.new("RGB", (width, len(parts) * block + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for number, part in enumerate(parts):
        top = number * block + GAP
        what = "captions of train" if part.name == "train" else "captions that no model has seen"
        pen.text((GAP, top), what, fill="black", font=ImageFont.load_default(size=13))
        for row, name in enumerate(names):
            y = top + 22 + LABEL + row * (side + GAP)
            pen.multiline_text((GAP, y + side // 3), wrap(name, 22), fill="black", font=font)
            for column in range(shown):
                x = 150 + column * (side + GAP)
                picture = Image.fromarray(drawn[row][number][column])
                canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
                if row == 0:
                    pen.multiline_text((x, top + 20), wrap(part.captions[column], 17), fill="black", font=font)
    return canvas


def wrap(text: str, width: int) -> str:
    """At most two lines."""
    lines = textwrap.wrap(text, width)
    return "\n".join(lines if len(lines) < 3 else [lines[0], lines[1][: width - 2] + "..."])


if __name__ == "__main__":
    main()
