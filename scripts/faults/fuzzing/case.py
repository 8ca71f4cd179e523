"""One hostile input: files in a folder, and what sqat is asked to do with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

# A command line of sqat without its name, run in the input's folder; or a function of the package.
Action = Sequence[str] | Callable[[], object]
# Writes one input into an empty folder; the same seed makes the same input.
MakeCase = Callable[[random.Random, Path], Sequence[Action]]

# Texts that a terminal or a parser may take for something else.
HOSTILE_TEXTS = (
    *(
        "\x1b]0;title\x07",
        "\x1b[2J\x1b[31mred",
        "a\nerror: forged",
        "a\rb",
        "\x9b31m",
        "\u202egnp.exe",
        "\u2028",
        "\x00",
    ),
    *(
        "\ud800",
        "\ufeff",
        "",
        " ",
        "a" * 300,
        "é" * 130,
        "../../outside",
        "/etc/hostname",
        "%s%d",
        "{0}",
        "[bold]x[/bold]",
    ),
    *("<script>alert(1)</script>", "'\"`$(id)", "nan", "1e999", "9" * 400, "-0", "true", "null", "None", "\U0001d11e"),
)


def flip_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Return the same bytes with up to three of them changed."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 3) if raw else 0):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def cut(draw: random.Random, raw: bytes) -> bytes:
    """Return the first part of the bytes."""
    return raw[: draw.randint(0, len(raw))]
