"""Which attention function a transformers model runs, and hooks on the q, k and v of its last block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from sqat.compat import attention_name, can_set_attention, quiet_transformers, register_attention
from sqat.errors import SqatError
from sqat.models.layer_selection import find_qkv, is_causal
from sqat.modules.attention import byte_attention, compared_attention, hooked_attention
from sqat.modules.parametrize import get_linear
from sqat.modules.qkv_hooks import QkvHooks
from sqat.quantization.placement import PLACEMENTS

HOOKED, BYTES, COMPARED = "sqat_hooked", "sqat_bytes", "sqat_compared"
FUNCTIONS = {HOOKED: hooked_attention, BYTES: byte_attention, COMPARED: compared_attention}


def use_hooked_attention(model: nn.Module, placement: str = "tensorrt", compare: bool = False) -> bool:
    """Switch to the attention whose operands can be quantized in a placement.

    Args:
        compare: compare that of the kernels to the family's own, which it then returns.

    Returns:
        False where the model does not go through transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel) or not can_set_attention(model):
        return False
    name = HOOKED if not PLACEMENTS[placement].kernels else COMPARED if compare else BYTES
    register_attention(name, FUNCTIONS[name])
    use_attention(model, name)
    return True


def use_attention(model: nn.Module, name: str) -> None:
    """Switch to an attention function of transformers by name; other models stay as they are."""
    if isinstance(model, PreTrainedModel):
        with quiet_transformers():
            model.set_attn_implementation(name)


def use_eager(model: nn.Module) -> None:
    """Switch to eager attention, for the exporter."""
    use_attention(model, "eager")


def current_attention(model: nn.Module) -> str | None:
    """Return the name of the model's attention function; None for a model that is not transformers'."""
    return attention_name(model) if isinstance(model, PreTrainedModel) else None


def attention_heads(model: nn.Module, linear: str) -> int:
    """Return the number of attention heads that a q linear is split into.

    Raises:
        SqatError: neither the modules around the linear nor their configurations tell it.
    """
    heads = find_number(model, linear, HEADS)
    if heads is None:
        raise SqatError(f"{type(model).__name__}: the number of attention heads of {linear} is not known",
                        f"its module or configuration needs one of {', '.join(HEADS)}",
                        code="unsupported-model")  # fmt: skip
    return heads


def find_number(model: nn.Module, linear: str, names: Sequence[str]) -> int | None:
    """Return the first whole number of these names in the modules around a linear, or in their configurations.

    The innermost module comes first. A model of texts and images has a configuration for each, and pyramids have
    another number in each part.
    """
    path = linear.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        for holder in (module, getattr(module, "config", None)):
            for name in names:
                number = getattr(holder, name, None)
                if isinstance(number, int) and number > 0:
                    return number
    return None


def hook_last_qkv(model: nn.Module, qkv: Sequence[str] | None = None) -> QkvHooks:
    """Hook q, k and v of the model's last block.

    Args:
        qkv: names of the linears; by default they are found by rule.
    """
    names = find_qkv(model, qkv)
    heads = attention_heads(model, names[0])
    if len(names) == 3:  # q and k have one width for each head
        query, key = (get_linear(model, name).out_features for name in names[:2])
        key_heads = max(heads * key // query, 1)
    else:
        key_heads = find_number(model, names[0], KEY_HEADS) or heads
    return QkvHooks(model, names, heads, key_heads, is_causal(model, names[0]), token_multiple(model))


def token_multiple(model: nn.Module) -> int:
    """Return the number of tokens to a multiple of which a model fills up texts: its windows or blocks."""
    config = getattr(model, "config", None)
    window = getattr(config, "attention_window", 1)  # Longformer, LED: one, or one for each layer
    block = getattr(config, "block_size", 1) if getattr(config, "attention_type", "") == "block_sparse" else 1
    return int(max([block, *(window if isinstance(window, list | tuple) else [window])]))


HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
