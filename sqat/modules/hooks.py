"""Taps: a function on the tensor at each activation site of a model, and the handle that takes it off.

One mechanism serves discovery (record which sites see the same tensor), calibration (observe) and
quantization-aware training (fake-quantize). Sites are named as the exporter names them:

    {layer}:input  {layer}:output              inputs and outputs (after bias) of linears and convolutions
    {attention}:query|key|softmax|value        operands of the two attention products
    {module}:add{j}.left|right                 operands of the j-th residual add run directly in that module

Residual adds are found by watching `Tensor.__add__` inside the encoder blocks (a TorchFunctionMode): both
operands are activations of the shape [B,T,H] of the block's input, which tells them from sums of attention
scores [B*h,T,T] (DeBERTa) and those inside an activation function. Left out: adds written as in-place or fused
kernels; models without the attention interface have no attention sites (the caller is told which).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sqat.modules.batch_norm import folded_norms

Tap = Callable[[str, Tensor], Tensor]
ATTENTION_TAP = "sqat_attention_tap"
ADDS = frozenset({torch.Tensor.add, torch.Tensor.__add__, torch.add, torch.Tensor.__radd__})


class Taps:
    """The taps on one model; `remove` gives the model back as it was."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[nn.Module, str, dict[str, Any]]] = []

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Give a module an attribute until the taps are removed; one of its own is put back then."""
        own = {name: vars(module)[name]} if name in vars(module) else {}
        setattr(module, name, value)
        self.attributes.append((module, name, own))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, name, own in reversed(self.attributes):
            delattr(module, name)
            vars(module).update(own)
        self.handles, self.attributes = [], []


def tap_linears(
    model: nn.Module,
    tap: Tap,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    taps: Taps | None = None,
) -> Taps:
    """Tap inputs and outputs of the named linears and convolutions; a folded norm's number belongs to the output."""
    taps = taps or Taps()
    norms = folded_norms(model)
    for name in inputs:
        before = partial(tap_input, tap, f"{name}:input")
        taps.handles.append(model.get_submodule(name).register_forward_pre_hook(before))
    for name in outputs:
        after = partial(tap_output, tap, f"{name}:output")
        taps.handles.append(model.get_submodule(norms.get(name, name)).register_forward_hook(after))
    return taps


def tap_input(tap: Tap, site: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (tap(site, args[0]), *args[1:])


def tap_output(tap: Tap, site: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return tap(site, output)


def tap_attention(model: nn.Module, tap: Tap, modules: Iterable[str], taps: Taps | None = None) -> Taps:
    """Tap query, key, softmax and value of the named attention modules."""
    taps = taps or Taps()
    for name in modules:
        module = model.get_submodule(name)
        taps.put(module, ATTENTION_TAP, partial(tap_operand, tap, name))
    return taps


def tap_operand(tap: Tap, name: str, role: str, x: Tensor) -> Tensor:
    return tap(f"{name}:{role}", x)


def tap_adds(model: nn.Module, tap: Tap, blocks: Sequence[str], taps: Taps | None = None) -> Taps:
    """Tap both operands of every residual add inside the named encoder blocks."""
    taps = taps or Taps()
    watch = WatchAdds(tap)
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            before = partial(watch.enter, name)
            taps.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            taps.handles.append(module.register_forward_hook(watch.leave, always_call=True))
    return taps


class WatchAdds(TorchFunctionMode):
    """Sees each add while a block runs, and knows which module runs it and how many came before."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap
        self.running: list[str] = []
        self.shape: torch.Size | None = None
        self.counts: dict[str, int] = {}

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.running:
            self.shape = next((x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            self.__enter__()  # type: ignore[no-untyped-call]
        self.running.append(name)
        self.counts[name] = 0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        if not self.running:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ADDS and is_residual(args, self.shape):
            name = self.running[-1]
            site = f"{name}:add{self.counts[name]}"
            self.counts[name] += 1
            args = (self.tap(f"{site}.left", args[0]), self.tap(f"{site}.right", args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


def is_residual(args: Sequence[Any], shape: torch.Size | None) -> bool:
    """Both operands are activations [B,T,H] shaped as the block's input."""
    pair = [x for x in args[:2] if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]
    return len(pair) == 2 and pair[0].dim() == 3 and pair[0].shape == pair[1].shape == shape
