"""Expect an error of sqat by its code: wording may improve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sqat.errors import ErrorCode, SqatError


@contextmanager
def raises_code(code: ErrorCode, match: str | None = None) -> Iterator[None]:
    """Fail unless a `SqatError` of the code is raised inside the block."""
    with pytest.raises(SqatError, match=match) as error:
        yield
    assert error.value.code == code
