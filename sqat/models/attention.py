"""Which attention function a transformers model runs, and hooks on the q, k and v of its last block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sqat.compat import attention_name, can_set_attention, quiet_transformers, register_attention
from sqat.models.layer_selection import find_qkv, is_causal
from sqat.modules.attention import byte_attention, compared_attention, hooked_attention
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


def attention_heads(model: nn.Module) -> int:
    """Return the number of attention heads by the config, where every family maps its own name to this one."""
    config: Any = model.config
    return int(config.num_attention_heads)


def hook_last_qkv(model: nn.Module, qkv: Sequence[str] | None = None) -> QkvHooks:
    """Hook q, k and v of the model's last block.

    Args:
        qkv: names of the linears; by default they are found by rule.
    """
    names, heads = find_qkv(model, qkv), attention_heads(model)
    key_heads = getattr(model.config, "num_key_value_heads", None)  # only families with grouped queries have it
    return QkvHooks(model, names, heads, key_heads, is_causal(model, names[0]))
