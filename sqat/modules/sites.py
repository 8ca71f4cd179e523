"""Which activation sites a placement quantizes, and which of them see the same tensor.

Found by running one small batch with a tap on every candidate: sites that see one tensor (q, k and v inputs;
a block's input and its skip connection) share one quantizer, so they are quantized once and stay equal.

Profiles:
    linear    inputs of the quantized linears; inputs and outputs of the quantized convolutions.
    tensorrt  also the attention products, residual adds and linear outputs (int8 in, int8 out: rule T16).
              An output that an attention product or a residual add reads is quantized once, there or here; one
              that feeds an activation function stays float (rule B8), its result is quantized at the next input.
    tensorrt-full
              also what feeds an activation function, so that every linear is int8 in and out.
    cpu       inputs of the quantized linears, and q, k and v where the attention products read them; the weights of
              the keys are bytes without a scale (`sqat.modules.attention`).

A convolution's output is a site in all of them, also before an activation function: ONNX Runtime has int8 convolutions
with int8 outputs only. Where nothing but a rectifier reads it, what the rectifier cuts off needs no range: the bound is
that of the rectified values, so that nothing is lost by quantizing before instead of behind it. Left out: residual adds
of convolutional networks, which stay float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqat.compat import tensor_version
from sqat.modules.hooks import tap_adds, tap_attention, tap_linears

Version = tuple[int, int]
Key = tuple[Version, int, int]
RECTIFIERS = {"relu": math.inf, "relu_": math.inf, "relu6": 6.0}
ACTIVATIONS = frozenset(
    {"gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "quick_gelu", "mish", "hardtanh", *RECTIFIERS}
)


@dataclass(frozen=True)
class Sites:
    """Sites to quantize.

    Attributes:
        leaders: site -> the first site that sees the same tensor (itself for most).
        tied: groups of leaders that share one bound, the largest: q, k, v of one attention, be it where the
            products read them or, in families without taps there, at the linears' outputs.
        left: site -> why it stays float.
        rectified: outputs that only a rectifier reads -> the largest value that it passes.
    """

    leaders: dict[str, str]
    tied: list[tuple[str, ...]]
    left: dict[str, str]
    rectified: Mapping[str, float] = field(default_factory=dict)


def discover_sites(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    linears: Sequence[str],
    blocks: Sequence[str],
    placement: str,
) -> Sites:
    """Run one batch in eval mode and choose the placement's sites.

    Args:
        inputs: keyword arguments of the model's forward, a small batch.
        linears: names of the linears and convolutions to quantize.
        blocks: names of the encoder blocks, for residual adds.
        placement: ``linear``, ``tensorrt``, ``tensorrt-full`` or ``cpu``.
    """
    keys: dict[str, Key] = {}
    watch = WatchActivations()
    handles = [m.register_forward_pre_hook(watch.enter) for m in model.modules() if is_activation(m)]

    def record(site: str, x: Tensor) -> Tensor:
        if site not in keys:  # DeBERTa runs q and k again, on the relative positions
            keys[site] = key_of(x)
            watch.note(x)
        return x

    convolutions = [name for name in linears if isinstance(model.get_submodule(name), nn.Conv2d)]
    taps = tap_linears(model, record, inputs=linears, outputs=convolutions)
    if placement != "linear":
        tap_attention(model, record, inner_modules(model, blocks), taps=taps)
    if placement.startswith("tensorrt"):
        tap_linears(model, record, outputs=[name for name in linears if name not in convolutions], taps=taps)
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
    outputs = {f"{name}:output": keys[f"{name}:output"] for name in convolutions if f"{name}:output" in keys}
    kept_float = set() if placement == "tensorrt-full" else watch.seen - {key[0] for key in outputs.values()}
    limits = {site: watch.passed(key[0]) for site, key in outputs.items()}
    rectified = {site: limit for site, limit in limits.items() if limit is not None}
    found = replace(choose_sites(keys, kept_float), rectified=rectified)
    return replace(found, tied=[]) if placement == "cpu" else found  # its fused q, k, v linear has a scale per channel


def choose_sites(keys: Mapping[str, Key], activations: Set[Version]) -> Sites:
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
    """Equal for views of all of one tensor, until something writes into it."""
    return (version_of(x), int(x.storage_offset()), x.numel())


def version_of(x: Tensor) -> Version:
    """A tensor's storage, and how often it was written into: a residual add may be done in place."""
    return (x.untyped_storage().data_ptr(), tensor_version(x))


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
    """Sees what enters an activation function, called by name or as a module, and what reads a tensor at all.

    Attributes:
        seen: tensors that an activation function reads.
        readers: noted tensor -> what each function that makes another tensor of it passes, as `limit_of` says.
        held: tensors of both, so that no storage is used twice during the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Version] = set()
        self.readers: dict[Version, list[float | None]] = {}
        self.held: list[Tensor] = []

    def note(self, x: Tensor) -> None:
        """Watch who reads a tensor from now on."""
        self.readers.setdefault(version_of(x), [])
        self.held.append(x)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for x in args:
            if isinstance(x, Tensor):
                self.activates(x)

    def activates(self, x: Tensor) -> None:
        self.seen.add(version_of(x))
        self.held.append(x)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if args and isinstance(args[0], Tensor) and name in ACTIVATIONS:
            self.activates(args[0])
        read = [version_of(x) for x in args if isinstance(x, Tensor)]
        result = function(*args, **(kwargs or {}))
        for version in read if isinstance(result, Tensor) else ():
            if version in self.readers:
                self.readers[version].append(limit_of(name, kwargs or {}))
        return result

    def passed(self, tensor: Version) -> float | None:
        """The largest value that a tensor's readers pass, if each of them is a rectifier; else None."""
        limits = self.readers.get(tensor, [])
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None


def limit_of(name: str, keywords: Mapping[str, Any]) -> float | None:
    """The largest value that a function passes if it is a rectifier (0 below 0, the value itself above), else None."""
    if name == "hardtanh" and keywords.get("min_val") == 0:  # torch's ReLU6 calls it
        return float(keywords["max_val"])
    return RECTIFIERS.get(name)


def observed_rows(site: str, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring a site's tensor and the real positions into one shape, so that padding is left out.

    Args:
        x: [B,T,H], or [B,h,T,d] at attention operands, or [B,h,T,S] at softmax.
        attention_mask: [B,T], 1 = real; None where nothing is padded (images).

    Returns:
        The tensor with positions leading and a bool mask of the leading dimensions. A tensor that has no tokens
        (what a pooler reads, relative positions) counts whole.
    """
    if attention_mask is None:
        return x, x.new_ones(x.shape[:-1], dtype=torch.bool)
    real = attention_mask.bool()
    if x.dim() < 4 and x.shape[:-1] != real.shape:
        return x, real.new_ones(x.shape[:-1])
    if role(site) == "softmax":
        return x.permute(0, 2, 3, 1), real[:, :, None] & real[:, None, :]
    if x.dim() == 4:
        return x.transpose(1, 2), real
    return x, real
