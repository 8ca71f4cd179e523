"""What several tests of models use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from sqat.errors import SqatError

MakeModel = Callable[..., PreTrainedModel]


def problem(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(SqatError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
