"""Find the activation sites of a placement by one run of a small batch, with a hook on every candidate.

A convolution's output is a site in all placements, also before an activation function: ONNX Runtime has int8
convolutions with int8 outputs only. Where only rectifiers read it, its amax is that of the rectified values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqat.compat import tensor_version
from sqat.modules.hooks import Hook, Hooks, hook_adds, hook_attention, hook_linears, is_activation
from sqat.modules.sites import Site, Sites, StorageVersion, TensorKey, choose_sites
from sqat.quantization.placement import Placement

RECTIFIERS = {"relu": math.inf, "relu_": math.inf, "relu6": 6.0}
ACTIVATIONS = frozenset(
    {"gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "quick_gelu", "mish", "hardtanh", *RECTIFIERS}
)


def discover_sites(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    layers: Sequence[str],
    blocks: Sequence[str],
    placement: Placement,
) -> Sites:
    """Run one batch in eval mode and choose the sites of a placement.

    Args:
        inputs: keyword arguments of the model's forward, a small batch.
        layers: names of the linears and convolutions to quantize.
        blocks: names of the encoder blocks, for attention and residual adds.
    """
    passes: dict[Site, list[TensorKey]] = defaultdict(list)
    readers = ReaderRecorder()
    hooks = Hooks()
    for module in model.modules():
        if is_activation(module):
            hooks.handles.append(module.register_forward_pre_hook(readers.enter_activation))

    def record(site: Site, x: Tensor) -> Tensor:
        passes[site].append(key_of(x))
        readers.watch(x)
        return x

    hook_candidates(model, record, layers, blocks, placement, hooks)
    training = model.training
    try:
        with torch.no_grad(), readers:
            model.eval()(**inputs)
    finally:
        model.train(training)
        hooks.remove()
    keys = {site: tuple(dict.fromkeys(seen)) for site, seen in passes.items()}
    outputs = {site: keys[site] for name in convolutions(model, layers) if (site := Site.of(name, "output")) in keys}
    stay_float = readers.activation_inputs - {key[0] for seen in outputs.values() for key in seen}
    sites = choose_sites(keys, set() if placement.activation_inputs else stay_float)
    limits: dict[str, float] = {
        site: limit for site, seen in outputs.items() if (limit := readers.rectifier_limit(seen)) is not None
    }
    # The fused q, k, v linear of the kernels has a scale for each channel, so that nothing needs one amax.
    groups = [] if placement.kernels else sites.shared_amax_groups
    return replace(sites, shared_amax_groups=groups, rectifier_limits=limits)


def hook_candidates(
    model: nn.Module, hook: Hook, layers: Sequence[str], blocks: Sequence[str], placement: Placement, hooks: Hooks
) -> None:
    """Hook every place that can be a site of a placement."""
    first = convolutions(model, layers)
    hook_linears(model, hook, inputs=layers, outputs=first, hooks=hooks)
    if placement.attention:
        hook_attention(model, hook, list_inner_modules(model, blocks), hooks=hooks)
    if placement.outputs:
        hook_linears(model, hook, outputs=[name for name in layers if name not in first], hooks=hooks)
        hook_adds(model, hook, blocks, hooks=hooks)


def convolutions(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the convolutions among the layers."""
    return [name for name in layers if isinstance(model.get_submodule(name), nn.Conv2d)]


def key_of(x: Tensor) -> TensorKey:
    """Return a key that is equal for views of all of one tensor, until something writes into it."""
    return (version_of(x), int(x.storage_offset()), x.numel())


def version_of(x: Tensor) -> StorageVersion:
    """Return a tensor's storage and how often it was written into: a residual add may be done in place."""
    return (x.untyped_storage().data_ptr(), tensor_version(x))


def list_inner_modules(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Return every module with children inside the blocks, once; the attention modules are among them."""
    listed = set[nn.Module]()
    return [
        name
        for block in blocks
        for name, module in model.get_submodule(block).named_modules(listed, block)
        if next(module.children(), None) is not None
    ]


class ReaderRecorder(TorchFunctionMode):
    """Records which tensors activation functions read, called by name or as a module, and who reads a watched tensor.

    Attributes:
        activation_inputs: tensors that an activation function reads.
        limits: watched tensor -> for each function that makes another tensor of it, what `rectifier_limit_of` returns.
        kept_alive: all these tensors, so that no storage is used twice during the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_inputs: set[StorageVersion] = set()
        self.limits: dict[StorageVersion, list[float | None]] = {}
        self.kept_alive: list[Tensor] = []

    def watch(self, x: Tensor) -> None:
        """Record from now on who reads a tensor."""
        self.limits.setdefault(version_of(x), [])
        self.kept_alive.append(x)

    def enter_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Record what an activation module reads (a forward pre-hook)."""
        for x in args:
            if isinstance(x, Tensor):
                self.add_activation_input(x)

    def add_activation_input(self, x: Tensor) -> None:
        self.activation_inputs.add(version_of(x))
        self.kept_alive.append(x)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if args and isinstance(args[0], Tensor) and name in ACTIVATIONS:
            self.add_activation_input(args[0])
        read = [version_of(x) for x in args if isinstance(x, Tensor)]
        result = function(*args, **(kwargs or {}))
        for version in read if isinstance(result, Tensor) else ():
            if version in self.limits:
                self.limits[version].append(rectifier_limit_of(name, kwargs or {}))
        return result

    def rectifier_limit(self, tensors: Sequence[TensorKey]) -> float | None:
        """Return the largest value that the readers of tensors pass, if each of them is a rectifier; else None."""
        read = [self.limits.get(version, []) for version, _, _ in tensors]
        limits = [limit for limit in chain(*read) if limit is not None]
        return max(limits) if all(read) and len(limits) == sum(map(len, read)) else None


def rectifier_limit_of(name: str, keywords: Mapping[str, Any]) -> float | None:
    """Return the largest value that a function passes if it is a rectifier (0 below 0, the value above), else None."""
    if name == "hardtanh" and keywords.get("min_val") == 0:  # torch's ReLU6 calls it
        return float(keywords["max_val"])
    return RECTIFIERS.get(name)
