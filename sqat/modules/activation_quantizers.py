"""Fake quantizers on activations: a hook at every site, with its inverse.

A tensor that several sites see (q, k and v inputs) is quantized once: the quantizer keeps it until all of them have
seen it, at most until the model's forward pass ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.modules.hooks import Hooks, hook_sites
from sqat.modules.parametrize import insert_weights_, remove_weights_
from sqat.modules.served_arithmetic import compute_as_kernels
from sqat.modules.sites import Site
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
    """The fake quantizers of all activation sites, called as a hook.

    Args:
        amax: site -> positive 0-d amax.
        shared_with: site -> the site whose amax it uses, itself for most.
        learned: each amax is a parameter with the LSQ gradient instead of a constant.
        kernels: compute as those of target cpu-sparse do: integers from -127, and in eval mode the same bits.
    """

    def __init__(
        self, amax: Mapping[str, Tensor], shared_with: Mapping[str, str], learned: bool = False, kernels: bool = False
    ) -> None:
        super().__init__()
        self.shared_with: dict[str, Site] = {site: Site(owner) for site, owner in shared_with.items()}
        self.learned, self.kernels = learned, kernels
        self.low = -HIGH if kernels else ACTIVATION_LOW
        # Sorted: files give tensors in any order, and a state must find each amax where it was saved.
        self.index = {Site(name): i for i, name in enumerate(sorted(amax))}
        for name, value in amax.items():
            check_amax(value, name)
        values = [amax[name].detach().clone() for name in self.index]
        self.values = nn.ParameterList(nn.Parameter(value, requires_grad=learned) for value in values)
        self.readers = Counter(self.shared_with.values())
        self.cache: dict[Site, tuple[Tensor, Tensor, int]] = {}

    def forward(self, site: Site, x: Tensor) -> Tensor:
        owner = self.shared_with[site]
        entry = self.cache.pop(owner, None)
        if entry is not None and (entry[0] is x or entry[1] is x):
            self._store(owner, *entry)
            return entry[1]
        quantize = fake_quantize_learned if self.learned else fake_quantize
        y = quantize(x, clamp_softmax_amax(owner, self.values[self.index[owner]]), self.low)
        if self.learned and x.dim() == 4 and site.role == "output":
            y = y.clone()  # its gradient needs y, and residual adds of convolutional nets write into what they read
        self._store(owner, x, y, self.readers[owner])
        return y

    def _store(self, owner: Site, x: Tensor, y: Tensor, readers: int) -> None:
        """Keep a tensor for the sites that have not seen it yet, and no longer: memory would fill."""
        if readers > 1:
            self.cache[owner] = (x, y, readers - 1)

    def forget(self, *_: object) -> None:
        """Drop the cached tensors; runs after every forward pass of the model."""
        self.cache.clear()

    def step(self, site: str) -> Tensor:
        """Return the distance between a site's quantized values, 0-d."""
        owner = self.shared_with[site]
        amax = self.values[self.index[owner]].detach().clamp(min=SMALLEST_AMAX)
        return clamp_softmax_amax(owner, amax) / HIGH

    def amax(self) -> dict[str, Tensor]:
        """Return the current amax of every site that owns one, on the CPU."""
        values = zip(self.index, self.values, strict=True)
        return {
            str(site): clamp_softmax_amax(site, value.detach().cpu().clamp(min=SMALLEST_AMAX)) for site, value in values
        }


def clamp_softmax_amax(site: Site, amax: Tensor) -> Tensor:
    """Return the amax, of probabilities at most 1 (rule B12); a learned one may drift beyond."""
    return amax.clamp(max=1.0) if site.role == "softmax" else amax


@dataclass(frozen=True)
class Insertion:
    """Inserted quantizers; `remove_quantizers_` takes them out."""

    quantizers: Quantizers
    hooks: Hooks
    forget: RemovableHandle


def insert_quantizers_(model: nn.Module, quantizers: Quantizers, blocks: list[str]) -> Insertion:
    """Hook every site of the quantizers, or none where that fails; a learned amax becomes a parameter of the model."""
    with ExitStack() as undo:
        model.add_module(QUANTIZERS, quantizers.to(next(model.parameters()).device))
        undo.callback(delattr, model, QUANTIZERS)
        hooks = Hooks()
        undo.callback(hooks.remove)
        hook_sites(model, quantizers, quantizers.shared_with, blocks, hooks)
        if quantizers.kernels:
            compute_as_kernels(model, quantizers.shared_with, quantizers.step, blocks, hooks)
        undo.pop_all()
    return Insertion(quantizers, hooks, model.register_forward_hook(quantizers.forget, always_call=True))


def remove_quantizers_(model: nn.Module, insertion: Insertion) -> dict[str, Tensor]:
    """Take the quantizers out and return every amax."""
    insertion.hooks.remove()
    insertion.forget.remove()
    delattr(model, QUANTIZERS)
    return insertion.quantizers.amax()


@contextmanager
def fake_quantized_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layers: Iterable[str],
    quantizers: Quantizers,
    blocks: list[str],
) -> Iterator[None]:
    """Put masks and fake quantizers on a model; afterwards its weights are plain floats, pruned ones +0.0.

    Where that fails, the model is as it was.

    Args:
        layers: layers whose weights are quantized.
        blocks: names of the encoder blocks.
    """
    with ExitStack() as inserted:
        inserted.callback(remove_quantizers_, model, insert_quantizers_(model, quantizers, blocks))
        inserted.callback(remove_weights_, model, insert_weights_(model, masks, layers))  # last: a mask leaves zeros
        yield
