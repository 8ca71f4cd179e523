"""Images: arrays out of a .npz, which is never unpickled, and image files through Pillow.

An image is [H,W,C], uint8 or float32 from 0 to 1, grey or RGB. An image file must lie in the folder of the file that
names it, links followed: rows come from strangers, who may not choose what else is read on this machine.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqat.data.real_format import check_binary
from sqat.errors import SqatError

Array = NDArray[Any]
CHANNELS = (1, 3)
# What NumPy and zipfile raise on damaged files; RuntimeError: one with a password.
DAMAGED = (
    *(ValueError, OSError, EOFError, MemoryError, RuntimeError, KeyError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
REPACK = "write it with numpy.savez_compressed(file, x=images, y=labels)"


def read_npz(path: Path, source_name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every row of the arrays of a .npz: pictures as arrays, all else as Python's own values.

    Raises:
        SqatError: no .npz, cut short, arrays of objects (which are pickled and never opened), or of unequal length.
    """
    arrays = load_arrays(path, source_name)
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(arrays[first]):
            problem = f'"{first}" has {len(arrays[first])} rows, "{name}" has {len(array) if array.ndim else "none"}'
            raise SqatError(problem, "all arrays of the file need one row an image", source_name, code="invalid-data")
    columns = {name: array if array.ndim > 1 else array.tolist() for name, array in arrays.items()}
    for number in range(len(arrays[first])):
        yield f"{source_name}:row {number + 1}", {name: values[number] for name, values in columns.items()}


def load_arrays(path: Path, source_name: str) -> dict[str, Array]:
    """Read the arrays of a .npz by name."""
    check_binary(path, source_name, ("a .npz of arrays", "a zip archive"))
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise SqatError("it is a single array, not a .npz", REPACK, source_name, code="unreadable-file")
        with file:
            arrays = {name: file[name] for name in file.files}
    except DAMAGED as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            problem = "an array of it holds Python objects, which would have to be unpickled"
            raise SqatError(
                problem, "store numbers and texts, not objects", source_name, code="unreadable-file"
            ) from None
        raise SqatError("not a .npz file, or cut short", REPACK, source_name, code="unreadable-file") from None
    if not arrays:
        raise SqatError("it holds no arrays", REPACK, source_name, code="unreadable-file")
    return arrays


def check_same_size(picture: Array, first: Array, name: str, place: str) -> None:
    """Refuse an image that differs in size, channels or type from the first of the split."""
    if picture.shape != first.shape or picture.dtype != first.dtype:
        problem = f'"{name}" is {describe_size(picture)}, the first row\'s is {describe_size(first)}'
        raise SqatError(
            problem, "bring all images to one size, depth and number of channels", place, code="invalid-data"
        )


def describe_size(picture: Array) -> str:
    """Return ``32 x 32 with 3 channels``, and the type where it is not uint8."""
    height, width, channels = picture.shape
    depth = "" if picture.dtype == np.uint8 else f" of {picture.dtype}"
    return f"{height} x {width} with {channels} channel{'s' if channels > 1 else ''}{depth}"


def picture_of(value: Any, name: str, folder: Path | None, place: str) -> Array:
    """Return the pixels [H,W,C] of a row's image, uint8 or float32 in 0..1, C 1 or 3.

    Args:
        value: an array [H,W] or [H,W,C], or the path of an image file.
        name: what the column is called.
        folder: of the file that has the row; None where it comes from elsewhere, and may name no file.

    Raises:
        SqatError: neither of the two, another shape or type, NaN or numbers beyond the range.
    """
    if isinstance(value, str):
        return read_image(image_file(value, folder, place), value, place)
    if not isinstance(value, np.ndarray):
        raise SqatError(f'"{name}" must be an array or the path of an image file, got {type(value).__name__}',
                        "set data.columns.image", place, code="invalid-data")  # fmt: skip
    picture = value[..., None] if value.ndim == 2 else value
    if picture.ndim != 3 or picture.shape[-1] not in CHANNELS or not picture.size:
        raise SqatError(f'"{name}" has shape {value.shape}, an image is [height, width] or [height, width, 1 or 3]',
                        "put the channels last, grey or RGB", place, code="invalid-data")  # fmt: skip
    if picture.dtype == np.uint8:
        return picture
    if not np.issubdtype(picture.dtype, np.floating):
        raise SqatError(
            f'"{name}" holds {picture.dtype}', "store uint8 0..255, or floats 0..1", place, code="invalid-data"
        )
    if not np.isfinite(picture).all():
        raise SqatError(
            f'"{name}" has pixels that are no number', "mend the image or leave the row out", place, code="invalid-data"
        )
    if picture.min() < 0 or picture.max() > 1:
        raise SqatError(f'"{name}" has pixels from {picture.min():.4g} to {picture.max():.4g}',
                        "scale floats to 0..1, or store uint8 0..255", place, code="invalid-data")  # fmt: skip
    return picture.astype(np.float32, copy=False)


def image_file(name: str, folder: Path | None, place: str) -> Path:
    """Return the path of a row's image file, in the folder of the file that has the row or deeper.

    Raises:
        SqatError: it lies elsewhere, is a folder or a pipe, or the name is none that a file can have.
    """
    if folder is None:
        raise SqatError(f'the image "{name}" is the name of a file, and the row comes from the hub',
                        "download the data set and give the path of the file that names its images", place,
                        code="invalid-data")  # fmt: skip
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        is_other = path.exists() and not path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, NUL or half a surrogate pair in it, links in a ring
        raise SqatError(
            f'"{name}" is no path of a file', "name an image beside this file", place, code="invalid-data"
        ) from None
    if not path.is_relative_to(root):
        raise SqatError(f'the image "{name}" lies outside the folder of the file that names it, {folder}',
                        "move the images there, or this file to a folder above them", place,
                        code="invalid-data")  # fmt: skip
    if is_other:
        raise SqatError(f'the image "{name}" is no file', "name an image, not a folder", place, code="unreadable-file")
    return path


def read_image(path: Path, name: str, place: str) -> Array:
    """Read the pixels [H,W,C] uint8 of an image file; grey stays one channel, all else becomes RGB."""
    try:
        from PIL import Image
    except ImportError:
        raise SqatError(
            "image files need Pillow", "pip install 'sqat[images]', or store arrays in a .npz", code="missing-package"
        ) from None
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("1", "L"):
                return np.asarray(image.convert("L"))[..., None]
            if "A" in image.mode or "transparency" in image.info:
                above = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise SqatError(f'there is no image "{name}"', f"looked at {path}", place, code="missing-file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        text = " ".join(str(error).split())[:200]
        raise SqatError(
            f'the image "{name}" cannot be read: {text}', "is it an image, and whole?", place, code="unreadable-file"
        ) from None
