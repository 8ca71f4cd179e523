"""The tensors that a model returns, by name: logits, hidden states, start and end logits, a tuple's entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sqat.errors import SqatError


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output in order, at any depth, each with its name.

    The names are those of the fields of a mapping or an object; a tuple's entries are ``output_0``, ``output_1``, and
    so on; a tensor alone is ``output``. What lies deeper is ``hidden_states/0``.
    """
    if isinstance(output, Tensor):
        yield name or "output", output
        return
    fields: Mapping[str, Any] = {}
    if isinstance(output, tuple | list):
        fields = {f"{name}/{index}" if name else f"output_{index}": part for index, part in enumerate(output)}
    elif isinstance(output, Mapping):
        fields = {f"{name}/{key}" if name else str(key): part for key, part in output.items()}
    elif not name:  # an object that is the whole output; deeper ones are caches
        fields = getattr(output, "__dict__", {})
    for key, part in fields.items():
        yield from named_tensors(part, key)


def floats_in(output: Any) -> Iterator[Tensor]:
    """Yield the float tensors of a model's or a module's output, in order."""
    for _, tensor in named_tensors(output):
        if tensor.is_floating_point() and tensor.numel():
            yield tensor


def tensor_outputs(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's output by the names of its fields.

    The loss, and fields that hold several tensors (hidden states of all layers, caches), are left out.

    Raises:
        SqatError: the model returns no tensor.
    """
    tensors = {name: tensor for name, tensor in named_tensors(output) if "/" not in name and name != "loss"}
    if not tensors:
        problem = f"the model returns a {type(output).__name__} without a tensor"
        hint = "return a tensor, a tuple, a dict or transformers' outputs"
        raise SqatError(problem, hint, code="unsupported-model")
    return tensors
