"""Rectified flow (arXiv:2209.03003, arXiv:2210.02747): straight paths from noise to images, and the walk along them.

Time 0 is noise, time 1 the image: ``x = (1 - t) noise + t image``. A model predicts the image (arXiv:2511.13720),
which gives the velocity ``(image - x) / (1 - t)``, with classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

Forward = Callable[[Mapping[str, Tensor]], Tensor]
Drawing = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], time [B]) -> the picture [B, ...]
Method = Literal["euler", "heun"]

NUMBER = "number"  # column of the rows that are measured: what their noise and time are drawn from
CUT = "cut"  # column of prepared rows: whether the caption was too long for the model
GOLDEN = 0.6180339887498949
LATEST = 0.95  # last time that counts: a picture's error becomes at most 1 / (1 - LATEST) times that of a velocity
EARLY, SPREAD = -1.2, 1.4  # mean and deviation of the logits of the times trained on


def signals(rows: Mapping[str, Sequence[Any]]) -> Tensor:
    """Return the pixels of rows as [B,C,H,W] from -1 to 1.

    Args:
        rows: columns pixels (bytes, channels last: one a pixel for 0..255, or float32 0..1), height, width, channels.
    """
    shape = (len(rows["pixels"]), rows["height"][0], rows["width"][0], rows["channels"][0])
    data = bytearray(b"".join(rows["pixels"]))
    are_bytes = len(data) == prod(shape)
    flat = torch.frombuffer(data, dtype=torch.uint8 if are_bytes else torch.float32).view(shape)
    return (flat.float() / (127.5 if are_bytes else 0.5) - 1).permute(0, 3, 1, 2).contiguous()


def pixels(signal: Tensor) -> Tensor:
    """Clip images [B,C,H,W] from -1 to 1 and return pixels [B,H,W,C] uint8."""
    return ((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def on_path(picture: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the point [B, ...] of each straight path at its time [B]."""
    share = expand_times(time, picture)
    return (1 - share) * noise + share * picture


def expand_times(time: Tensor, like: Tensor) -> Tensor:
    """Reshape times [B] to [B, 1, ...], to multiply with ``like`` [B, ...]."""
    return time.reshape(-1, *[1] * (like.dim() - 1))


def remaining(time: Tensor) -> Tensor:
    """Return 1 - t, by which an image's error becomes a velocity's; never below 0.05."""
    return (1 - time).clamp(min=1 - LATEST)


def draw_times(count: int) -> Tensor:
    """Draw times [count] in (0, 1) to train on: logit-normal (arXiv:2403.03206), a tenth of them before 0.05.

    At such early times only the caption decides what is drawn.
    """
    return torch.sigmoid(torch.randn(count) * SPREAD + EARLY)


def fixed_draws(numbers: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return noise [B, *shape] and times [B] for measuring, a function of each row's number.

    The times of numbers that follow each other are spread evenly over 0..0.95 (multiples of the golden ratio), so that
    even a small split is measured at all of them.
    """
    times = torch.tensor([(GOLDEN * (number + 1)) % 1 * LATEST for number in numbers], dtype=torch.float64)
    return seeded_noise(numbers, shape), times.float()


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw normal noise [B, *shape], each row from its own seed."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def captioned(forward: Forward, states: Tensor, mask: Tensor, scale: float) -> Drawing:
    """Return a function that predicts images for captions, with classifier-free guidance.

    Args:
        forward: picture [B,C,H,W] from a model's inputs by name, by torch or by any runtime.
        states: of the captions' tokens [B,T,E], with their mask [B,T].
        scale: 0 ignores the captions, 1 is the model itself, more exaggerates what the caption changes.
    """
    nothing, unmasked = torch.zeros_like(states), torch.zeros_like(mask)

    def drawing(x: Tensor, time: Tensor) -> Tensor:
        inputs = {"sample": x, "timestep": time[:, None]}
        guided = forward({**inputs, "encoder_hidden_states": states, "encoder_attention_mask": mask})
        if scale == 1:
            return guided
        free = forward({**inputs, "encoder_hidden_states": nothing, "encoder_attention_mask": unmasked})
        return free + scale * (guided - free)

    return drawing


def walk(drawing: Drawing, noise: Tensor, steps: int, method: Method = "heun") -> Tensor:
    """Follow the velocity from noise [B, ...] at time 0 to pictures at time 1, in equal steps.

    Args:
        method: ``euler`` asks the model once a step; ``heun`` twice, and goes by the mean of the velocities at both
            ends (at time 1 there is none, so the last step is Euler's): an error of second order.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"a walk needs at least 1 step, got {steps}")

    def velocity(x: Tensor, number: int) -> Tensor:
        time = number / steps
        return (drawing(x, torch.full((len(x),), time, dtype=x.dtype, device=x.device)) - x) / (1 - time)

    x = noise
    for number in range(steps):
        speed = velocity(x, number)
        if method == "heun" and number + 1 < steps:
            speed = (speed + velocity(x + speed / steps, number + 1)) / 2
        x = x + speed / steps
    return x
