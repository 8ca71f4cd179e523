"""scikit-learn's digits (grey images of 8 x 8) as .npz files for recipes/digits.yaml.

    python scripts/data/digits.py [--output runs/digits]

The split has a fixed seed: 60 % train, 15 % dev, 25 % test of each digit. The data set does not name its writers, so
one writer's digits may be in two splits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 0
HELD_OUT, TEST_OF_HELD_OUT = 0.4, 0.625


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    folder = parser.parse_args().output
    digits = load_digits()
    images = np.minimum(digits.images * 16, 255).astype(np.uint8)
    rows = np.arange(len(images))
    train, rest = train_test_split(rows, test_size=HELD_OUT, random_state=SEED, stratify=digits.target)
    dev, test = train_test_split(rest, test_size=TEST_OF_HELD_OUT, random_state=SEED, stratify=digits.target[rest])
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in {"train": train, "dev": dev, "test": test}.items():
        chosen = np.sort(chosen)
        np.savez_compressed(folder / f"{name}.npz", x=images[chosen], y=digits.target[chosen].astype(np.int64))
        print(f"{folder / name}.npz: {len(chosen)} images")


if __name__ == "__main__":
    main()
