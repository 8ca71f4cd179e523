"""Rectified flow: the sampler against distributions whose best drawing is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqat.models.rectified_flow import (
    LATEST,
    Drawing,
    Method,
    captioned,
    draw_times,
    expand_times,
    fixed_draws,
    on_path,
    pixels,
    remaining,
    seeded_noise,
    signals,
    walk,
)


def gaussian(mean: float, spread: float) -> Drawing:
    """The best guess of x1 ~ N(mean, spread^2) from x = (1 - t) x0 + t x1: linear regression of jointly normal ones."""

    def drawing(x: Tensor, time: Tensor) -> Tensor:
        t = expand_times(time, x)
        slope = t * spread**2 / ((1 - t) ** 2 + t**2 * spread**2)
        return mean + slope * (x - t * mean)

    return drawing


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_single_picture_is_reached_from_any_noise_in_any_number_of_steps(steps: int, method: Method) -> None:
    picture = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    drawn = walk(lambda x, time: picture, torch.randn(2, 3, 4, 4, dtype=torch.float64), steps, method)
    torch.testing.assert_close(drawn, picture)


def test_a_normal_distribution_is_reached_and_noise_keeps_its_order() -> None:
    """Noise N(0, 1) must become mean + spread * noise: the flow between two normal distributions of one dimension."""
    noise = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    drawn = walk(gaussian(2.0, 0.5), noise, 400, "heun")
    torch.testing.assert_close(drawn, 2.0 + 0.5 * noise, atol=2e-3, rtol=0)


def error(steps: int, method: Method) -> float:
    noise = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    return float((walk(gaussian(2.0, 0.5), noise, steps, method) - (2.0 + 0.5 * noise)).abs().max())


def test_eulers_error_is_of_first_order_and_heuns_smaller_at_as_many_calls() -> None:
    assert math.log2(error(20, "euler") / error(40, "euler")) == pytest.approx(1, abs=0.2)
    assert error(20, "heun") < error(40, "euler") / 2


def test_a_walk_needs_steps() -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        walk(lambda x, time: x, torch.zeros(1, 1), 0)


def test_the_path_ends_in_noise_and_in_the_picture() -> None:
    picture, noise = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    point = on_path(picture, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(point[0], noise[0])
    torch.testing.assert_close(point[1], 0.75 * noise[1] + 0.25 * picture[1])
    torch.testing.assert_close(point[2], picture[2])


def test_a_pictures_error_over_what_remains_is_the_velocitys() -> None:
    """From the definition: velocity = picture - noise."""
    picture, noise, guess = torch.randn(3, 4, 5, 5).unbind()
    time = torch.rand(4) * LATEST
    x = on_path(picture, noise, time)
    velocity = (guess - x) / expand_times(1 - time, x)
    torch.testing.assert_close(
        (guess - picture) / expand_times(remaining(time), x), velocity - (picture - noise), atol=1e-4, rtol=0
    )


def test_what_remains_never_gets_small() -> None:
    assert float(remaining(torch.tensor([1.0]))) == pytest.approx(0.05)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=8, unique=True))
@settings(max_examples=25, deadline=None)
def test_fixed_draws_depend_on_the_number_alone(numbers: list[int]) -> None:
    noise, time = fixed_draws(numbers, (2, 3))
    for row, number in enumerate(numbers):
        alone, moment = fixed_draws([number], (2, 3))
        assert torch.equal(noise[row], alone[0])
        assert time[row] == moment[0]
    assert len({tuple(row.flatten().tolist()) for row in noise}) == len(numbers)
    assert bool(((time >= 0) & (time <= LATEST)).all())


def test_times_of_neighbours_cover_the_way_evenly() -> None:
    _, time = fixed_draws(range(64), (1,))
    gaps = np.diff(np.sort(time.numpy()))
    assert gaps.max() < 3 * LATEST / 64


def test_trained_times_are_logit_normal() -> None:
    torch.manual_seed(0)
    logits = torch.logit(draw_times(4000))
    assert float(logits.mean()) == pytest.approx(-1.2, abs=0.08)
    assert float(logits.std()) == pytest.approx(1.4, abs=0.07)


def test_seeded_noise_is_the_same_in_every_order() -> None:
    noise = seeded_noise([5, 6], (3, 2))
    assert torch.equal(noise.flip(0), seeded_noise([6, 5], (3, 2)))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
def test_guidance_goes_from_the_free_picture_past_the_captioned_one(scale: float, wanted: float) -> None:
    """A model that draws 1 without a caption and 3 with one."""
    drawing = captioned(
        lambda inputs: 1 + 2 * inputs["encoder_attention_mask"], torch.ones(1, 1, 4), torch.ones(1, 1), scale
    )
    assert float(drawing(torch.zeros(1, 1), torch.zeros(1))) == wanted


def test_guidance_takes_the_whole_caption_away() -> None:
    seen = []

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs)
        return inputs["sample"]

    captioned(forward, torch.ones(2, 3, 4), torch.ones(2, 3), 2.0)(torch.zeros(2, 1), torch.full((2,), 0.5))
    assert [float(each["encoder_hidden_states"].sum()) for each in seen] == [24.0, 0.0]
    assert [float(each["encoder_attention_mask"].sum()) for each in seen] == [6.0, 0.0]
    assert all(each["timestep"].tolist() == [[0.5], [0.5]] for each in seen)


def test_bytes_become_signals_and_pixels_again() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    columns = {"pixels": [row.tobytes() for row in whole], "height": [4, 4], "width": [4, 4], "channels": [3, 3]}
    signal = signals(columns)
    assert signal.shape == (2, 3, 4, 4)
    assert float(signal[1, 2, 3, 0]) == pytest.approx(whole[1, 3, 0, 2] / 127.5 - 1)
    assert np.array_equal(pixels(signal).numpy(), whole)


def test_float_pixels_mean_the_same() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3), np.uint8)
    sizes = {"height": [2], "width": [2], "channels": [3]}
    floats = (whole / 255).astype(np.float32)
    one, other = (signals({"pixels": [array.tobytes()], **sizes}) for array in (whole, floats))
    torch.testing.assert_close(one, other)


def test_pixels_are_clipped() -> None:
    assert pixels(torch.tensor([[[[-2.0, 2.0]]]])).flatten().tolist() == [0, 255]
