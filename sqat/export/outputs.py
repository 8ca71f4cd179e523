"""The tensors that a model returns, by name: logits, hidden states, start and end logits, a tuple's entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sqat.errors import SqatError


def tensor_outputs(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's output by the names of its fields.

    A tuple's entries are ``output_0``, ``output_1``, and so on; a tensor alone is ``output``. The loss, and fields that
    hold several tensors (hidden states of all layers, caches), are left out.

    Raises:
        SqatError: the model returns no tensor.
    """
    named: Mapping[str, Any]
    if isinstance(output, Tensor):
        named = {"output": output}
    elif isinstance(output, tuple | list):
        named = {f"output_{index}": value for index, value in enumerate(output)}
    else:  # an object's attributes are its fields
        named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and name != "loss"}
    if not tensors:
        problem = f"the model returns a {type(output).__name__} without a tensor"
        hint = "return a tensor, a tuple, a dict or transformers' outputs"
        raise SqatError(problem, hint, code="unsupported-model")
    return tensors
