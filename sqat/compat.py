"""Private APIs of torch and transformers that sqat depends on, each behind one function.

`tests/test_compat.py` has a test for each, named after the version that it was tried with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = ["BatchNorm"]


def is_tracing() -> bool:
    """Say whether torch records or replaces the operators that run, as in tracing or under a dispatch mode."""
    return bool(torch._C._is_tracing() or torch._C._len_torch_dispatch_stack())


def has_storage(x: Tensor) -> bool:
    """Say whether a tensor has memory of its own; wrapper subclasses have none."""
    return torch._C._has_storage(x)


def tensor_version(x: Tensor) -> int:
    """Return the number of in-place changes of a tensor's storage so far."""
    return x._version


def padding_widths(module: nn.Conv2d) -> list[int]:
    """Return a convolution's padding in the form that `torch.nn.functional.pad` takes: left, right, top, bottom."""
    return [*module._reversed_padding_repeated_twice]


def hook_tables(module: nn.Module) -> list[dict[int, object]]:
    """Return all dictionaries in which torch keeps the hooks of a module."""
    return [value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary in which torch keeps the parameters of a module itself, to read or change."""
    return module._parameters


def compress_2to4(weight: Tensor) -> Tensor:
    """Compress a 2:4 weight for cuSPARSELt."""
    return torch._cslt_compress(weight)


def search_2to4_algorithm(compressed: Tensor, x: Tensor, **options: Any) -> int:
    """Return the number of cuSPARSELt's fastest algorithm for a product; the options are those of the product."""
    return int(torch._cslt_sparse_mm_search(compressed, x, **options))


def multiply_2to4(compressed: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Multiply a compressed 2:4 weight by a dense matrix with cuSPARSELt."""
    return torch._cslt_sparse_mm(compressed, x, **options)


def multiply_2to4_cutlass(
    values: Tensor, metadata: Tensor, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """Multiply a packed 2:4 weight by a dense matrix with CUTLASS, and add the bias."""
    if bias is None:
        return torch._sparse_semi_structured_mm(values, metadata, x, out_dtype=out_dtype)
    return torch._sparse_semi_structured_addmm(bias, values, metadata, x, out_dtype=out_dtype)


def register_attention(name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Make an attention function known to transformers, with the masks of eager attention; again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the eager attention function of a module's own family, which its forward hands to transformers.

    Every family's file has its own. None where the module's class has no such function.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    return forward.__globals__.get(names[0]) if names else None


def can_set_attention(model: Any) -> bool:
    """Say whether a transformers model goes through the attention interface."""
    return bool(model._can_set_attn_implementation())


def attention_name(model: Any) -> str:
    """Return the name of the attention function that a transformers model uses."""
    return str(model.config._attn_implementation)


def draw_weights_(model: Any, module: nn.Module) -> None:
    """Draw the weights of one module of a transformers model at random, as the model's family does."""
    for parameter in own_parameters(module).values():
        if parameter is not None:
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model._init_weights(module)


def find_source_file(source: str, name: str, revision: str | None) -> str | None:
    """Return the local path of a hub model's file, downloading it where needed; None where the model has no such."""
    from transformers.utils.hub import cached_file

    path: str | None = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars while open."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
