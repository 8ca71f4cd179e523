"""Which activation sites a profile quantizes, and which of them see the same tensor.

Found by running one small batch with a tap on every candidate: sites that see one tensor (q, k and v inputs;
a block's input and its skip connection) share one quantizer, so they are quantized once and stay equal.

Profiles:
    linear    inputs of the quantized linears.
    tensorrt  also the attention products, residual adds and linear outputs (int8 in, int8 out: rule T16).
              An output that an attention product or a residual add reads is quantized once, there or here; one
              that feeds an activation function stays float (rule B8), its result is quantized at the next input.
    tensorrt-full
              also what feeds an activation function, so that every linear is int8 in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqat.insertion.taps import tap_adds, tap_attention, tap_linears

Key = tuple[int, int, int]
ACTIVATIONS = frozenset({"gelu", "relu", "relu_", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "quick_gelu", "mish"})


@dataclass(frozen=True)
class Sites:
    """Sites to quantize.

    Attributes:
        leaders: site -> the first site that sees the same tensor (itself for most).
        tied: groups of leaders that share one bound, the largest: q, k, v of one attention, be it where the
            products read them or, in families without taps there, at the linears' outputs.
        left: site -> why it stays float.
    """

    leaders: dict[str, str]
    tied: list[tuple[str, ...]]
    left: dict[str, str]


def discover_sites(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    linears: Sequence[str],
    blocks: Sequence[str],
    profile: str,
) -> Sites:
    """Run one batch in eval mode and choose the profile's sites.

    Args:
        inputs: keyword arguments of the model's forward, a small batch.
        linears: names of the linears to quantize.
        blocks: names of the encoder blocks, for residual adds.
        profile: ``linear``, ``tensorrt`` or ``tensorrt-full``.
    """
    seen: dict[str, Tensor] = {}  # holds every tensor, so that no storage is used twice during the run
    watch = WatchActivations()
    handles = [m.register_forward_pre_hook(watch.enter) for m in model.modules() if is_activation(m)]

    def record(site: str, x: Tensor) -> Tensor:
        seen.setdefault(site, x)  # DeBERTa runs q and k again, on the relative positions
        return x

    taps = tap_linears(model, record, inputs=linears)
    if profile != "linear":
        tap_linears(model, record, outputs=linears, taps=taps)
        tap_attention(model, record, inner_modules(model, blocks), taps=taps)
        tap_adds(model, record, blocks, taps=taps)
    training = model.training
    try:
        with torch.no_grad(), watch:
            model.eval()(**inputs)
    finally:
        model.train(training)
        taps.remove()
        for handle in handles:
            handle.remove()
    kept_float = () if profile == "tensorrt-full" else watch.seen
    return choose_sites({site: key_of(x) for site, x in seen.items()}, {key_of(x)[0] for x in kept_float})


def choose_sites(keys: Mapping[str, Key], activations: set[int]) -> Sites:
    """Drop what is covered elsewhere, and group what sees one tensor.

    Args:
        keys: site -> key of the tensor it sees.
        activations: storages that an activation function reads and that stay float, all of them or (a gated
            unit's half) in part.
    """
    products = {key for site, key in keys.items() if role(site) in PRODUCT_ROLES}
    left: dict[str, str] = {}
    outputs = set()
    for site, key in keys.items():
        if role(site) != "output":
            continue
        if key in products:
            left[site] = "quantized where the attention product reads it"
        elif key[0] in activations:
            left[site] = "input of an activation function (rule B8)"
        else:
            outputs.add(key)
    for site, key in keys.items():
        if role(site).startswith("add") and key in outputs:
            left[site] = "quantized at the linear's output"
    first: dict[Key, str] = {}
    leaders = {site: first.setdefault(key, site) for site, key in keys.items() if site not in left}
    attentions = dict.fromkeys(site.rpartition(":")[0] for site in leaders if role(site) == "query")
    tied = [
        (
            *(leaders[f"{name}:{part}"] for part in ("query", "key", "value")),
            *fused_output(f"{name}:value", keys, leaders),
        )
        for name in attentions
    ]
    return Sites(leaders, tied + tied_outputs(leaders), left)


def fused_output(value: str, keys: Mapping[str, Key], leaders: Mapping[str, str]) -> list[str]:
    """The quantized output of a fused q, k, v linear of which ``value`` is a part: with one bound for both, the second
    quantization changes nothing."""
    storage = keys[value][0]
    return [
        site
        for site, leader in leaders.items()
        if site == leader and role(site) == "output" and keys[site][0] == storage
    ]


def tied_outputs(leaders: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Outputs of linears of one module that read one tensor: they may be merged into one linear (rule T16)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, leader in leaders.items():
        if role(site) == "output":
            name = site.rpartition(":")[0]
            groups.setdefault((name.rpartition(".")[0], leaders[f"{name}:input"]), []).append(leader)
    return [tuple(group) for group in groups.values() if len(group) > 1]


PRODUCT_ROLES = ("query", "key", "softmax", "value")


def role(site: str) -> str:
    """``input``, ``output``, ``query``, ..., or ``add0.left``."""
    return site.rpartition(":")[2]


def key_of(x: Tensor) -> Key:
    """Equal for views of all of one tensor."""
    return (x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel())


def inner_modules(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Every module with children inside the blocks: the attention modules are among them."""
    return [
        name
        for block in blocks
        for name, module in model.get_submodule(block).named_modules(prefix=block)
        if next(module.children(), None) is not None
    ]


def is_activation(module: nn.Module) -> bool:
    """A module of torch's or transformers' activations; some (gelu_new) are sums and powers inside."""
    home = type(module).__module__.rpartition(".")[2]
    return home in ("activation", "activations") and next(module.children(), None) is None


class WatchActivations(TorchFunctionMode):
    """Keeps the tensors that enter an activation function, called by name or as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.extend(x for x in args if isinstance(x, Tensor))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and getattr(function, "__name__", "") in ACTIVATIONS:
            self.seen.append(args[0])
        return function(*args, **(kwargs or {}))


def observed_rows(site: str, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a site's tensor and the real positions into one shape, so that padding is left out.

    Args:
        x: [B,T,H], or [B,h,T,d] at attention operands, or [B,h,T,S] at softmax.
        attention_mask: [B,T], 1 = real.

    Returns:
        The tensor with positions leading and a bool mask of the leading dimensions. A tensor that has no tokens
        (what a pooler reads, relative positions) counts whole.
    """
    real = attention_mask.bool()
    if x.dim() < 4 and x.shape[:-1] != real.shape:
        return x, real.new_ones(x.shape[:-1])
    if role(site) == "softmax":
        return x.permute(0, 2, 3, 1), real[:, :, None] & real[:, None, :]
    if x.dim() == 4:
        return x.transpose(1, 2), real
    return x, real
