"""Hooks: a function on the tensor at each activation site of a model, and the handle that removes them.

One mechanism serves discovery (record which sites see the same tensor), calibration (observe) and quantization-aware
training (fake-quantize). Models without transformers' attention interface have no attention sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sqat.modules.batch_norm import find_folded_norms
from sqat.modules.sites import PRODUCT_ROLES, Site

Hook = Callable[[Site, Tensor], Tensor]
ATTENTION_HOOK = "sqat_attention_hook"
ADDS = frozenset({torch.Tensor.add, torch.Tensor.__add__, torch.add, torch.Tensor.__radd__})


class Hooks:
    """The hooks on one model; `remove` gives the model back as it was."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[nn.Module, str, dict[str, Any]]] = []

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Give a module an attribute until `remove`, which puts its own back."""
        own = {name: vars(module)[name]} if name in vars(module) else {}
        setattr(module, name, value)
        self.attributes.append((module, name, own))

    def remove(self) -> None:
        """Remove all hooks and attributes."""
        for handle in self.handles:
            handle.remove()
        for module, name, own in reversed(self.attributes):
            delattr(module, name)
            vars(module).update(own)
        self.handles, self.attributes = [], []


def hook_linears(
    model: nn.Module,
    hook: Hook,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    hooks: Hooks | None = None,
) -> Hooks:
    """Hook inputs and outputs of the named linears and convolutions; a folded norm's bias belongs to the output."""
    hooks = hooks or Hooks()
    norms = find_folded_norms(model)

    def on_input(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hook(site, args[0]), *args[1:])

    def on_output(site: Site, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return hook(site, output)

    for name in inputs:
        before = partial(on_input, Site.of(name, "input"))
        hooks.handles.append(model.get_submodule(name).register_forward_pre_hook(before))
    for name in outputs:
        after = partial(on_output, Site.of(name, "output"))
        hooks.handles.append(model.get_submodule(norms.get(name, name)).register_forward_hook(after))
    return hooks


def hook_attention(model: nn.Module, hook: Hook, modules: Iterable[str], hooks: Hooks | None = None) -> Hooks:
    """Hook query, key, softmax and value of the named attention modules."""
    hooks = hooks or Hooks()

    def on_operand(name: str, role: str, x: Tensor) -> Tensor:
        return hook(Site.of(name, role), x)

    for name in modules:
        hooks.set_attribute(model.get_submodule(name), ATTENTION_HOOK, partial(on_operand, name))
    return hooks


def hook_adds(model: nn.Module, hook: Hook, blocks: Sequence[str], hooks: Hooks | None = None) -> Hooks:
    """Hook both operands of every residual add inside the named encoder blocks."""
    hooks = hooks or Hooks()
    watcher, hooked = AddWatcher(hook), set[nn.Module]()  # blocks may share modules
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(hooked, block):
            before = partial(watcher.enter, name)
            hooks.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.handles.append(module.register_forward_hook(watcher.leave, always_call=True))
    return hooks


def hook_sites(
    model: nn.Module, hook: Hook, sites: Iterable[str], blocks: Sequence[str], hooks: Hooks | None = None
) -> Hooks:
    """Hook the named sites and no other."""
    chosen = {Site(site) for site in sites}

    def on_chosen(site: Site, x: Tensor) -> Tensor:
        return hook(site, x) if site in chosen else x

    def modules_with(*roles: str) -> list[str]:
        return sorted({site.module for site in chosen if site.role in roles})

    hooks = hook_linears(model, on_chosen, modules_with("input"), modules_with("output"), hooks)
    hook_attention(model, on_chosen, modules_with(*PRODUCT_ROLES), hooks)
    if any(site.is_add for site in chosen):
        hook_adds(model, on_chosen, blocks, hooks)
    return hooks


class AddWatcher(TorchFunctionMode):
    """Sees each add while a block runs, and knows which module runs it and how many adds came before.

    Both operands of a residual add are activations of the shape [B,T,H] of the block's input. Sums of attention scores
    [B*h,T,T] (DeBERTa) and those inside an activation function have other shapes. In-place adds are not seen.
    """

    def __init__(self, hook: Hook) -> None:
        super().__init__()
        self.hook = hook
        self.running: list[str] = []
        self.shape: torch.Size | None = None
        self.counts: dict[str, int] = {}

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module starts (a forward pre-hook)."""
        if not self.running:
            self.shape = next((x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            self.__enter__()  # type: ignore[no-untyped-call]
        self.running.append(name)
        self.counts[name] = 0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that the innermost module ends (a forward hook)."""
        self.running.pop()
        if not self.running:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ADDS and self.is_residual(args):
            name = self.running[-1]
            role = f"add{self.counts[name]}"
            self.counts[name] += 1
            left, right = (Site.of(name, f"{role}.{side}") for side in ("left", "right"))
            args = (self.hook(left, args[0]), self.hook(right, args[1]), *args[2:])
        return function(*args, **(kwargs or {}))

    def is_residual(self, args: Sequence[Any]) -> bool:
        """Whether both operands are activations [B,T,H] shaped as the block's input."""
        pair = [x for x in args[:2] if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]
        return len(pair) == 2 and pair[0].dim() == 3 and pair[0].shape == pair[1].shape == self.shape


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's or transformers' activations; some (gelu_new) are sums and powers inside."""
    file = type(module).__module__.rpartition(".")[2]
    return file in ("activation", "activations") and next(module.children(), None) is None
