"""The command line called in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sqat import cli

RECIPE = """\
model: {source: tiny}
task: classification
data: {train: train.jsonl, dev: dev.jsonl}
stages:
  train:
  prune:
  calibrate:
  qat:
  export:
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def raising(error: BaseException) -> Callable[..., Any]:
    def fake(*arguments: Any, **options: Any) -> Any:
        raise error

    return fake
