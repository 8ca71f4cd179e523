"""The task text to image: its error against the velocity's definition, its figures, and mistakes in the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.models.rectified_flow import LATEST, fixed_draws, on_path
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import TextToImageTask
from sqat.tasks import build_task
from sqat.tasks.splits import load_rows
from sqat.tasks.text_to_image import TextToImage

COLUMNS = Columns(image="x", text="names")


def write(path: Path, count: int = 6, side: int = 4, names: list[str] | None = None) -> Path:
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez_compressed(path, x=pictures, names=np.array(names or [f"thing {i}" for i in range(count)]))
    return path


def rows_of(path: Path) -> Dataset:
    return load_rows(SplitConfig(path=path.name), "train", COLUMNS, TextToImageTask(), path.parent)


@pytest.fixture
def judged(tmp_path: Path) -> Dataset:
    return TextToImage().evaluation_rows(rows_of(write(tmp_path / "some.npz")))


def pictures(rows: Dataset) -> torch.Tensor:
    arrays = [np.frombuffer(row["pixels"], np.uint8).reshape(4, 4, 3) for row in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def test_rows_are_pictures_and_captions_without_a_label(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path / "some.npz"))
    assert set(rows.column_names) == {"pixels", "height", "width", "channels", "text", "place"}
    assert rows[1]["text"] == "thing 1"
    assert isinstance(build_task(TextToImageTask(), rows), TextToImage)


def test_loss_is_the_squared_error_of_the_velocity() -> None:
    picture, noise, guess = torch.randn(3, 5, 3, 4, 4).unbind()
    time = torch.rand(5) * LATEST
    x = on_path(picture, noise, time)
    batch = Batch({"sample": x, "timestep": time[:, None]}, picture, torch.full((5,), -1))
    velocity = (guess - x) / (1 - time)[:, None, None, None]
    expected = (velocity - (picture - noise)).square().mean()
    torch.testing.assert_close(TextToImage().loss(guess, batch), expected, rtol=1e-4, atol=1e-5)


def test_who_knows_the_picture_explains_all(judged: Dataset) -> None:
    figures = TextToImage().metrics(pictures(judged), judged)
    assert figures == {"explained": pytest.approx(1), "velocity-mse": pytest.approx(0, abs=1e-9)}


def test_who_says_the_noisy_picture_moves_nowhere_and_explains_next_to_nothing(judged: Dataset) -> None:
    """Velocity 0 everywhere: what is left is the mean square of the true velocity, by definition."""
    picture = pictures(judged)
    noise, time = fixed_draws(judged["number"], picture.shape[1:])
    still = on_path(picture, noise, time)
    figures = TextToImage().metrics(still, judged)
    truth = (picture - noise).double()
    assert figures["velocity-mse"] == pytest.approx(float(truth.square().mean()), rel=1e-5)
    assert figures["explained"] == pytest.approx(1 - float(truth.square().mean() / truth.var(unbiased=False)), rel=1e-3)


def test_a_diverged_model_is_told(judged: Dataset) -> None:
    drawn = pictures(judged)
    drawn[0, 0, 0, 0] = float("nan")
    with pytest.raises(SqatError, match="not finite"):
        TextToImage().metrics(drawn, judged)


def test_agreement_is_told_picture_by_picture(judged: Dataset) -> None:
    wanted = torch.randn(6, 3, 4, 4)
    got = wanted.clone()
    got[2] += 0.05
    got[3] += 0.002
    assert TextToImage().same_decision(wanted, got, judged).tolist() == [True, True, False, True, True, True]


def test_an_empty_caption_is_told_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "some.npz", names=["a", "b", "  ", "d", "e", "f"])
    with pytest.raises(SqatError, match='"names" is empty') as caught:
        rows_of(path)
    assert caught.value.place == "some.npz:row 3"


def test_pictures_of_unequal_size_are_told_with_their_row(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, side in (("one.png", 4), ("two.png", 8)):
        image.new("RGB", (side, side), "red").save(tmp_path / name)
    (tmp_path / "some.csv").write_text("x,names\none.png,red\ntwo.png,large red\n")
    with pytest.raises(SqatError, match="8 x 8 with 3 channels, the first row's is 4 x 4") as caught:
        rows_of(tmp_path / "some.csv")
    assert caught.value.place == "some.csv:3"
