"""Judge the amax of a site by what it does to the products that read the site, on rows drawn from all batches.

Every row gets a random rank that depends on its batch and place alone, and the lowest ranks stay: the rows are the
same for any number of processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sqat.distributed import broadcast_from, process_state
from sqat.modules.parametrize import get_layer
from sqat.modules.sites import Site, Sites, align_positions
from sqat.quantization.calibrators.mse import squared_errors
from sqat.quantization.fake_quant import SMALLEST_AMAX, fake_quantize, fake_quantize_weight
from sqat.quantization.histogram import Histogram
from sqat.sparsity.columns import input_windows, to_columns


class RowSample:
    """A bounded sample of the rows [N,C] that layers multiply with their weights.

    Args:
        sites: inputs of linears that read one tensor, or of one convolution.
        size: most rows that are kept.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], size: int) -> None:
        self.sites, self.size = sites, size
        self.layers = [get_layer(model, site.module) for site in sites]
        weight = self.layers[0].weight
        self.rows = torch.zeros(size, weight[0].numel(), device=weight.device)
        self.ranks = torch.full((size,), torch.inf, dtype=torch.float64)  # infinite: the row is empty

    def observe(self, site: Site, x: Tensor, attention_mask: Tensor | None, batch: int) -> None:
        """Draw from the real positions of one batch, whose number is the seed."""
        generator = torch.Generator().manual_seed(batch)
        layer = self.layers[0]
        if isinstance(layer, nn.Conv2d):
            windows = x[0, 0].numel() // (layer.stride[0] * layer.stride[1])  # of an image, about
            images = torch.randperm(len(x), generator=generator)[: 1 + self.size // max(windows, 1)]
            rows = input_windows(layer, x[images.to(x.device)])
            places = torch.arange(len(rows))
        else:
            aligned, real = align_positions(site, x, attention_mask)
            rows = aligned.reshape(-1, aligned.shape[-1])
            counts = real.view(*real.shape, *[1] * (aligned.dim() - 1 - real.dim())).expand(aligned.shape[:-1])
            places = counts.flatten().nonzero().squeeze(1).cpu()
        ranks, order = torch.rand(len(places), dtype=torch.float64, generator=generator).sort(stable=True)
        chosen = places[order[: self.size]].to(x.device)
        self.add(rows[chosen].detach().float(), ranks[: self.size])

    def add(self, rows: Tensor, ranks: Tensor) -> None:
        """Keep the rows of the lowest ranks."""
        ranks, order = torch.cat([self.ranks, ranks]).sort(stable=True)
        self.ranks = ranks[: self.size]
        self.rows = torch.cat([self.rows, rows])[order[: self.size].to(rows.device)]

    def merge_over_processes(self) -> None:
        """Draw from what all processes have drawn."""
        rows, ranks = self.rows, self.ranks
        self.ranks = torch.full_like(ranks, torch.inf)
        for process in range(process_state().num_processes):
            self.add(broadcast_from(rows, process), broadcast_from(ranks, process))

    def product_errors(self, amaxes: Sequence[float], low: int) -> list[float]:
        """Return the mean over rows x of ||Q(x) W_q - x W||^2 / ||x W||^2 for each amax, W of all layers."""
        x = self.rows[self.ranks.isfinite().to(self.rows.device)]
        weights = [to_columns(layer.weight.detach().float()) for layer in self.layers]
        rounded = torch.cat([fake_quantize_weight(weight, None) for weight in weights])
        exact = x @ torch.cat(weights).T
        # Relative to the row: else a few tokens with large outputs, which a norm makes small again, decide alone.
        sizes = exact.square().sum(1)
        sizes = sizes.masked_fill(sizes == 0, torch.inf)
        quantized = (fake_quantize(x, x.new_tensor(amax), low) for amax in amaxes)
        return [float(((y @ rounded.T - exact).square().sum(1) / sizes).mean()) for y in quantized]


def plan_samples(model: nn.Module, sites: Sites, size: int) -> dict[Site, RowSample]:
    """Return an empty sample for all linears that read one tensor, and for each convolution; by their first site.

    Grouped convolutions have none, since their product is not one of two matrices.
    """
    readers: dict[tuple[Site, int | str], list[Site]] = defaultdict(list)
    for site, first in sites.shared_with.items() if size else ():
        layer = get_layer(model, site.module) if site.role == "input" else None
        if isinstance(layer, nn.Linear):
            readers[first, layer.in_features].append(site)
        elif layer is not None and layer.groups == 1:
            readers[first, site].append(site)
    return {group[0]: RowSample(model, group, size) for group in readers.values()}


class Judge:
    """The harm that an amax does to the readers of a site.

    Args:
        samples: of `plan_samples`, filled; without one a reader counts by E||Q(x) - x||^2.
        low: lowest integer of an activation.
    """

    def __init__(
        self, sites: Sites, histograms: Mapping[str, Histogram], samples: Mapping[Site, RowSample], low: int
    ) -> None:
        self.histograms, self.low = histograms, low
        self.samples: dict[str, list[RowSample]] = defaultdict(list)
        for site, sample in samples.items():
            self.samples[sites.shared_with[site]].append(sample)
        in_samples = {site for sample in samples.values() for site in sample.sites}
        others = (site for site in sites.shared_with if site not in in_samples and site.role != "output")
        self.has_other_reader = {sites.shared_with[site] for site in others}

    def harms(self, site: str, amaxes: Sequence[float]) -> list[float]:
        """Return for each amax the relative error of the products, and of x where something else reads it."""
        parts = [sample.product_errors(amaxes, self.low) for sample in self.samples[site]]
        histogram = self.histograms[site]
        if histogram.max_abs and (site in self.has_other_reader or not parts):
            error = squared_errors(histogram)
            total = error(SMALLEST_AMAX) or 1.0  # at this amax every x becomes 0
            parts.append([error(amax) / total for amax in amaxes])
        return [sum(each) for each in zip(*parts, strict=True)] or [0.0] * len(amaxes)

    def choose(self, group: Sequence[Site], candidates: Mapping[str, Mapping[str, float]]) -> str:
        """Return the name of the candidate that does least harm to sites with one amax, the largest of theirs."""
        names = [*dict.fromkeys(name for site in group for name in candidates[site])]
        if len(names) < 2:
            return names[0] if names else ""
        amaxes = [max(candidates[site].get(name, 1.0) for site in group) for name in names]
        harms = [sum(each) for each in zip(*(self.harms(site, amaxes) for site in group), strict=True)]
        return names[harms.index(min(harms))]
