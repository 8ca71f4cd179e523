"""Reading images: arrays and files become checked rows, each mistake is told with its row and a remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sqat.data.pixels import ImageProcessor, augment_images
from sqat.data.rows import Rows
from sqat.data.sources import split_digest
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import ClassificationTask
from sqat.tasks.image_classification import read_records
from sqat.tasks.splits import load_rows

TASK = ClassificationTask(name="image-classification")
COLUMNS = Columns(image="x", label="y")
RANDOM = np.random.default_rng(0)


def pictures(count: int = 4, side: int = 6, channels: int = 3) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, side, side, channels)).astype(np.uint8)


def save(folder: Path, **arrays: Any) -> Path:
    path = folder / "train.npz"
    np.savez(path, **arrays)
    return path


def read(folder: Path, name: str = "train.npz", columns: Columns = COLUMNS, **more: Any) -> Rows:
    return load_rows(SplitConfig(path=name, **more), "train", columns, TASK, folder)


def told(folder: Path, name: str = "train.npz", columns: Columns = COLUMNS) -> str:
    with pytest.raises(SqatError) as caught:
        read(folder, name, columns)
    return str(caught.value)


@pytest.mark.parametrize("labels", [np.array([3, 1, 1, 3]), np.array(["b", "a", "a", "b"])], ids=["numbers", "texts"])
def test_arrays_become_rows(tmp_path: Path, labels: np.ndarray) -> None:
    images = pictures()
    save(tmp_path, x=images, y=labels)
    rows = read(tmp_path)
    assert rows["label"] == [str(label) for label in labels]
    assert rows["place"] == [f"train.npz:row {number}" for number in (1, 2, 3, 4)]
    assert b"".join(rows["pixels"]) == images.tobytes()
    assert [rows[0][name] for name in ("height", "width", "channels")] == [6, 6, 3]
    assert len(read(tmp_path, limit=3)) == 3


def test_grey_images_and_floats_are_read(tmp_path: Path) -> None:
    images = RANDOM.random((4, 6, 5))
    save(tmp_path, x=images, y=np.array([0, 1, 0, 1]))
    row = read(tmp_path)[1]
    assert [row[name] for name in ("height", "width", "channels")] == [6, 5, 1]
    np.testing.assert_allclose(np.frombuffer(row["pixels"], np.float32).reshape(6, 5), images[1], atol=1e-7)


LABELS = np.array([0, 1, 0, 1])
NAN = np.where(np.arange(4)[:, None, None] == 2, np.nan, np.zeros((4, 6, 6)))
MISTAKES = {
    "lengths": ({"x": pictures(), "y": LABELS[:3]}, '"x" has 4 rows, "y" has 3', "one row an image"),
    "empty": ({"x": pictures(0), "y": LABELS[:0]}, "no rows", "at least one"),
    "one class": ({"x": pictures(), "y": LABELS * 0}, 'all 4 rows have the same class "0"', "at least two"),
    "NaN": ({"x": NAN, "y": LABELS}, "train.npz:row 3", "no number"),
    "range": ({"x": np.full((4, 6, 6), 16.0), "y": LABELS}, "from 16 to 16", "scale floats to 0..1"),
    "integers": ({"x": pictures().astype(np.int64), "y": LABELS}, "holds int64", "store uint8"),
    "channels first": ({"x": pictures().transpose(0, 3, 1, 2), "y": LABELS}, "shape (3, 6, 6)", "channels last"),
    "objects": ({"x": pictures(), "y": np.array([0, "a", None, 1], object)}, "Python objects", "numbers and texts"),
    "no column": ({"x": pictures(), "names": LABELS}, 'no column "y"', "data.columns.label"),
    "not an image": ({"x": np.arange(4), "y": LABELS}, '"x" must be an array or the path', "data.columns.image"),
    "a class that is no number": ({"x": pictures(), "y": LABELS * np.nan}, "must be a class", "data.columns.label"),
    "single number": ({"x": pictures(), "y": LABELS, "z": np.float32(1)}, '"z" has none', "one row an image"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_arrays_are_told(tmp_path: Path, case: str) -> None:
    arrays, problem, remedy = MISTAKES[case]
    save(tmp_path, **arrays)
    message = told(tmp_path)
    assert problem in message
    assert remedy in message
    assert "train.npz" in message
    assert "\n" not in message


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "not a .npz file, or cut short"), (b"text", "is a text file"),
    (b"PK\x03\x04 cut short", "not a .npz file, or cut short"), (b"PK\x03\x04 xl/workbook", "is an Excel workbook"),
])  # fmt: skip
def test_what_is_no_npz_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "train.npz").write_bytes(content)
    assert problem in told(tmp_path)


def test_a_single_array_is_told(tmp_path: Path) -> None:
    with (tmp_path / "train.npz").open("wb") as file:
        np.save(file, pictures())
    assert "a single NumPy array" in told(tmp_path)


def test_a_cut_npz_is_told(tmp_path: Path) -> None:
    path = save(tmp_path, x=pictures(), y=LABELS)
    path.write_bytes(path.read_bytes()[:-40])
    assert "not a .npz file, or cut short" in told(tmp_path)


def image_files(folder: Path, images: list[Any], name: str = "train.jsonl") -> None:
    """Image files beside a table that names them."""
    (folder / "pictures").mkdir()
    lines = []
    for number, image in enumerate(images):
        path = f"pictures/{number}.png"
        if image is not None:
            image.save(folder / path)
        lines.append(json.dumps({"file": path, "kind": number % 2}))
    (folder / name).write_text("\n".join(lines) + "\n")


FILES = Columns(image="file", label="kind")


def test_image_files_are_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    images = pictures(2)
    clear = np.concatenate([images[0], np.zeros((6, 6, 1), np.uint8)], axis=2)
    image_files(tmp_path, [image.fromarray(images[0]), image.fromarray(images[1]), image.fromarray(clear, "RGBA")])
    rows = read(tmp_path, "train.jsonl", FILES)
    assert [rows[i]["pixels"] for i in (0, 1)] == [images[0].tobytes(), images[1].tobytes()]
    assert set(rows[2]["pixels"]) == {255}  # nothing to see: white
    (tmp_path / "grey").mkdir()
    image_files(tmp_path / "grey", [image.fromarray(picture[..., 0]) for picture in images])
    grey = read(tmp_path, "grey/train.jsonl", FILES)
    assert grey[1]["channels"] == 1
    assert grey[1]["pixels"] == images[1, ..., 0].tobytes()


def test_a_changed_image_file_changes_the_digest_of_its_split(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image_files(tmp_path, [image.fromarray(picture) for picture in pictures(2)])
    split = SplitConfig(path="train.jsonl")
    before = split_digest(split, tmp_path, "file")
    assert split_digest(split, tmp_path, "file") == before
    image.fromarray(pictures(1)[0]).save(tmp_path / "pictures/1.png")
    assert split_digest(split, tmp_path, "file") != before


def test_mistakes_in_image_files_are_told(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    small, large = image.fromarray(pictures(1)[0]), image.fromarray(pictures(1, side=7)[0])
    image_files(tmp_path, [small, large])
    message = told(tmp_path, "train.jsonl", FILES)
    assert "train.jsonl:2" in message
    assert "7 x 7 with 3 channels, the first row's is 6 x 6" in message
    (tmp_path / "pictures/1.png").unlink()
    assert 'train.jsonl:2: there is no image "pictures/1.png"' in told(tmp_path, "train.jsonl", FILES)
    (tmp_path / "pictures/1.png").write_bytes((tmp_path / "pictures/0.png").read_bytes()[:60])
    assert 'the image "pictures/1.png" cannot be read' in told(tmp_path, "train.jsonl", FILES)
    image.fromarray(pictures(1)[0, ..., 0]).save(tmp_path / "pictures/1.png")
    assert "6 x 6 with 1 channel, the first row's is 6 x 6 with 3" in told(tmp_path, "train.jsonl", FILES)


def naming(folder: Path, name: str) -> str:
    """What reading a table says that names one image beside it and then ``name``."""
    rows = [{"file": "pictures/0.png", "kind": 0}, {"file": name, "kind": 1}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return told(folder, "train.jsonl", FILES)


def test_a_row_names_no_image_outside_the_folder_of_its_file(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    inside, outside = tmp_path / "data", tmp_path / "data-of-another"
    for folder in (inside, outside):
        folder.mkdir()
        image_files(folder, [image.fromarray(picture) for picture in pictures(2)])
    (inside / "pictures/link.png").symlink_to(outside / "pictures/1.png")
    (inside / "folder").symlink_to(outside / "pictures")
    for name in (str(outside / "pictures/1.png"), "../data-of-another/pictures/1.png", "pictures/link.png",
                 "folder/1.png", "../nowhere.png", "pictures/../../data-of-another/pictures/1.png"):  # fmt: skip
        message = naming(inside, name)
        assert message.startswith(
            f'train.jsonl:2: the image "{name}" lies outside the folder of the file that names it'
        )
        assert message.endswith("; move the images there, or this file to a folder above them")
    assert "lies outside" in naming(inside, "/dev/zero")


def test_the_digest_of_a_split_leaves_its_folder_no_more_than_its_rows(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image_files(tmp_path, [image.fromarray(pictures(1)[0])])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link.png").symlink_to(tmp_path / "pictures/0.png")
    rows = [{"file": name} for name in ("../pictures/0.png", "link.png", str(tmp_path / "pictures/0.png"), "/dev/zero")]
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    split = SplitConfig(path="data/train.jsonl")
    before = split_digest(split, tmp_path, "file")  # for ever, were /dev/zero read
    (tmp_path / "pictures/0.png").write_bytes(b"another")
    assert split_digest(split, tmp_path, "file") == before


def test_what_no_file_is_called_is_told(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image_files(tmp_path, [image.fromarray(pictures(1)[0])])
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    os.mkfifo(tmp_path / "pipe")
    assert "is no path of a file" in naming(tmp_path, "a\0b")
    assert "half of a surrogate pair" in naming(tmp_path, "\ud800")
    for name in ("pipe", "pictures", ""):
        assert f'the image "{name}" is no file' in naming(tmp_path, name)
    for name in ("ring", "x" * 5000):
        (tmp_path / "train.jsonl").write_text(json.dumps({"file": name, "kind": 0}) + "\n")
        assert "train.jsonl:1: " in told(tmp_path, "train.jsonl", FILES)


def test_links_and_paths_within_the_folder_are_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    images = pictures(2)
    (tmp_path / "data").mkdir()
    image_files(tmp_path / "data", [image.fromarray(picture) for picture in images])
    (tmp_path / "data/link.png").symlink_to("pictures/1.png")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "data")  # the folder itself may be reached in any way
    names = ["pictures/../pictures/0.png", "link.png", str(tmp_path / "data/pictures/0.png")]
    rows = [{"file": name, "kind": number % 2} for number, name in enumerate(names)]
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    read_in = read(tmp_path, "elsewhere/train.jsonl", FILES)["pixels"]
    assert list(read_in) == [images[number].tobytes() for number in (0, 1, 0)]
    split_digest(SplitConfig(path="elsewhere/train.jsonl"), tmp_path, "file")


def test_a_row_of_the_hub_names_no_file(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pictures(1)[0]).save(tmp_path / "0.png")
    row = {"file": str(tmp_path / "0.png"), "kind": 0}
    with pytest.raises(
        SqatError, match=r"hub:row 1: the image \S+ is the name of a file, and the row comes from the hub"
    ):
        list(read_records(iter([("hub:row 1", row)]), FILES, TASK, None, None))


PROCESSOR = ImageProcessor(6, 6, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def prepared(folder: Path, images: np.ndarray) -> Rows:
    save(folder, x=images, y=np.arange(len(images)) % 2)
    rows = read(folder)
    return rows.remove_columns("label").add_column("label", [int(label) for label in rows["label"]])


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_pixels_are_scaled_and_normalised(tmp_path: Path, kind: str) -> None:
    images = pictures()
    rows = prepared(tmp_path, images if kind == "uint8" else images / 255)
    batch = PROCESSOR.collate(PROCESSOR.prepare(rows, 128), [2, 0])
    wanted = (images[[2, 0]] / 255 - np.array(PROCESSOR.mean)) / np.array(PROCESSOR.std)
    np.testing.assert_allclose(batch.inputs["pixel_values"].numpy(), wanted.transpose(0, 3, 1, 2), atol=1e-6)
    assert batch.labels.tolist() == [0, 0]
    assert batch.labels.dtype == torch.int64


def test_transformers_reads_the_processor_and_scales_alike(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from transformers import AutoImageProcessor

    from sqat.models.image import Images

    images = pictures()
    PROCESSOR.save(tmp_path)
    assert Images().processor(tmp_path, "") == PROCESSOR
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(list(images), return_tensors="pt")["pixel_values"]
    ours = PROCESSOR.collate(PROCESSOR.prepare(prepared(tmp_path, images), 128), [0, 1, 2, 3]).inputs["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_images_of_another_size_than_the_model_are_told(tmp_path: Path) -> None:
    with pytest.raises(SqatError, match=r"train.npz:row 1: the image is 7 x 7 with 3 channels, the model reads 6 x 6"):
        PROCESSOR.prepare(prepared(tmp_path, pictures(side=7)), 128)


def test_augmentation_moves_and_mirrors_and_follows_torch_s_generator(tmp_path: Path) -> None:
    images = pictures(40)
    batch = PROCESSOR.collate(PROCESSOR.prepare(prepared(tmp_path, images), 128), list(range(40)))
    torch.manual_seed(1)
    once = augment_images(batch, 1, True).inputs["pixel_values"]
    torch.manual_seed(1)
    assert torch.equal(augment_images(batch, 1, True).inputs["pixel_values"], once)
    seen = set()
    for before, after in zip(batch.inputs["pixel_values"], once, strict=True):
        seen.add(next(how for how in candidates() if torch.equal(moved(before, *how), after)))
    assert len({flip for *_, flip in seen}) == 2
    assert len({how[:2] for how in seen}) == 9
    assert torch.equal(augment_images(batch, 0, False).inputs["pixel_values"], batch.inputs["pixel_values"])


def candidates() -> list[tuple[int, int, bool]]:
    return [(down, right, flip) for down in (-1, 0, 1) for right in (-1, 0, 1) for flip in (False, True)]


def moved(image: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    """One image [C,H,W] moved by a loop over its pixels."""
    _, height, width = image.shape
    result = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            place = width - 1 - column if flip else column
            source = min(max(row + down, 0), height - 1), min(max(place + right, 0), width - 1)
            result[:, row, column] = image[:, source[0], source[1]]
    return result
