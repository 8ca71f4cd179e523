"""Fake quantizers on activations: the tap at every site, with its inverse.

A tensor that several sites see (q, k and v inputs) is quantized once: the quantizer remembers it until all of
them have seen it, at most until the model's forward pass ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.modules.gelu import tap_activations
from sqat.modules.hooks import Tap, Taps, tap_adds, tap_attention, tap_linears
from sqat.modules.served_arithmetic import serve_as_kernels
from sqat.modules.sites import role
from sqat.quantization.fake_quant import (
    ACTIVATION_LOW,
    HIGH,
    SMALLEST_AMAX,
    check_amax,
    fake_quantize,
    fake_quantize_learned,
)

QUANTIZERS = "sqat_quantizers"


class Quantizers(nn.Module):
    """Fake quantizer of every activation site, called as a tap.

    Args:
        amax: leader site -> positive 0-d bound.
        leaders: site -> leader site.
        learned: bounds are parameters with the LSQ gradient instead of constants.
        kernels: compute as those of target cpu-sparse do: integers from -127, and in eval mode the same bits.
    """

    def __init__(
        self, amax: Mapping[str, Tensor], leaders: Mapping[str, str], learned: bool = False, kernels: bool = False
    ) -> None:
        super().__init__()
        self.leaders, self.learned, self.kernels = dict(leaders), learned, kernels
        self.low = -HIGH if kernels else ACTIVATION_LOW
        # By name: files give tensors in any order, and a state is to find its bounds in the order it was saved with.
        self.index = {name: i for i, name in enumerate(sorted(amax))}
        for name, bound in amax.items():
            check_amax(bound, name)
        bounds = [amax[name].detach().clone() for name in self.index]
        self.bounds = nn.ParameterList(nn.Parameter(bound, requires_grad=learned) for bound in bounds)
        self.sharers = Counter(self.leaders.values())
        self.last: dict[str, tuple[Tensor, Tensor, int]] = {}

    def forward(self, site: str, x: Tensor) -> Tensor:
        leader = self.leaders[site]
        last = self.last.pop(leader, None)
        if last is not None and (last[0] is x or last[1] is x):
            self._remember(leader, *last)
            return last[1]
        quantize = fake_quantize_learned if self.learned else fake_quantize
        y = quantize(x, within_reach(leader, self.bounds[self.index[leader]]), self.low)
        if self.learned and x.dim() == 4 and role(site) == "output":
            y = y.clone()  # its gradient needs y, and residual adds of convolutional nets write into what they read
        self._remember(leader, x, y, self.sharers[leader])
        return y

    def _remember(self, leader: str, x: Tensor, y: Tensor, left: int) -> None:
        """Keep a tensor for the sites that have not seen it yet; a forward pass would else hold every activation."""
        if left > 1:
            self.last[leader] = (x, y, left - 1)

    def forget(self, *_: object) -> None:
        """Drop the remembered tensors; runs after every forward pass of the model."""
        self.last.clear()

    def step(self, site: str) -> Tensor:
        """The distance of a site's quantized values, 0-d."""
        leader = self.leaders[site]
        return within_reach(leader, self.bounds[self.index[leader]].detach().clamp(min=SMALLEST_AMAX)) / HIGH

    def amax(self) -> dict[str, Tensor]:
        """Current bound of every leader, on the CPU."""
        bounds = zip(self.index, self.bounds, strict=True)
        return {name: within_reach(name, bound.detach().cpu().clamp(min=SMALLEST_AMAX)) for name, bound in bounds}


def within_reach(site: str, bound: Tensor) -> Tensor:
    """A bound of probabilities is at most 1 (rule B12), where a learned one may drift beyond."""
    return bound.clamp(max=1.0) if role(site) == "softmax" else bound


@dataclass(frozen=True)
class Insertion:
    """Inserted quantizers; `remove_quantizers_` takes them out."""

    quantizers: Quantizers
    taps: Taps
    forget: RemovableHandle


def insert_quantizers_(model: nn.Module, quantizers: Quantizers, blocks: list[str]) -> Insertion:
    """Tap every site of the quantizers, or none where that fails; learned bounds become parameters of the model."""
    with ExitStack() as undo:
        model.add_module(QUANTIZERS, quantizers.to(next(model.parameters()).device))
        undo.callback(delattr, model, QUANTIZERS)
        taps = Taps()
        undo.callback(taps.remove)
        tap_sites(model, quantizers, list(quantizers.leaders), blocks, taps)
        if quantizers.kernels:
            tap_activations(model, blocks, taps)
            serve_as_kernels(model, quantizers.leaders, quantizers.step, blocks, taps)
        undo.pop_all()
    return Insertion(quantizers, taps, model.register_forward_hook(quantizers.forget, always_call=True))


def tap_sites(model: nn.Module, tap: Tap, sites: Iterable[str], blocks: list[str], taps: Taps | None = None) -> Taps:
    """Tap just the named sites."""
    wanted = set(sites)

    def only(site: str, x: Tensor) -> Tensor:
        return tap(site, x) if site in wanted else x

    names: dict[str, list[str]] = {}
    for site in wanted:
        names.setdefault("add" if role(site).startswith("add") else role(site), []).append(site.rpartition(":")[0])
    taps = tap_linears(model, only, sorted(names.get("input", ())), sorted(names.get("output", ())), taps)
    attentions = {name for part in ("query", "key", "softmax", "value") for name in names.get(part, ())}
    tap_attention(model, only, sorted(attentions), taps)
    if "add" in names:
        tap_adds(model, only, blocks, taps)
    return taps


def remove_quantizers_(model: nn.Module, insertion: Insertion) -> dict[str, Tensor]:
    """Take the quantizers out and return their bounds."""
    insertion.taps.remove()
    insertion.forget.remove()
    delattr(model, QUANTIZERS)
    return insertion.quantizers.amax()
