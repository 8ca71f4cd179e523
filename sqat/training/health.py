"""Whether training is still sound, told at the step and by the layer's name.

What is no number ends the fit before the optimizer has moved a weight, so that neither the model nor the mid-stage
state on the disk is spoiled. A learned scale that runs away ends it after the step that moved it and before that is
saved. What is only weak (a dead layer, rows that were pruned whole, a site that clips much of what it sees) is
remarked, once for each kind. Left out: activations that are always zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sqat.checkpoint.manifest import Manifest
from sqat.distributed import first_nonempty
from sqat.errors import SqatError
from sqat.modules.activation_quantizers import QUANTIZERS, Quantizers
from sqat.training.fsdp import full_tensor

EXPLODED = 100.0  # times what calibration found
SATURATED = 0.1  # share of the values beyond the bound
SHOWN = 3  # names in one remark
LOWER = "lower learning_rate, or look at the data"


def check_losses(losses: Mapping[str, float], model: nn.Module, again: Callable[[], object], step: int) -> None:
    """Refuse a loss that is no number, naming the first layer that puts out one.

    Args:
        losses: the same in all processes, which tell each other what they find.
        again: computes the losses of the step once more.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            layer = first_nonempty(first_broken(model, again))
            where = f"; the first layer to put out NaN or infinity is {layer}" if layer else ""
            raise SqatError(f"the {name} loss is {value} at step {step}{where}", LOWER)


def first_broken(model: nn.Module, again: Callable[[], object]) -> str:
    """Name of the innermost module that is first to put out a NaN or an infinity; empty where none does."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, given: object, output: object) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in floats_in(output)):
                found.append(plain_name(name) or type(module).__name__)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            again()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def floats_in(output: object) -> Iterator[Tensor]:
    """Float tensors in what a module puts out."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    for part in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ():
        yield from floats_in(part)


def plain_name(name: str) -> str:
    """A layer's own name, without what wraps its weight."""
    return name.partition(".parametrizations")[0]


def check_gradients(model: nn.Module, step: int) -> Tensor:
    """Norm of all gradients; refuse what is no number, naming the layer nearest to the loss that has such a gradient.

    A learned scale is named, by its site, only where no layer is to be.
    """
    scales = {f"{QUANTIZERS}.values.{i}": f"the scale of {site}" for i, site in enumerate(learned_bounds(model))}
    known = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    known.sort(key=lambda each: each[0] not in scales)
    norm = total_norm([grad for _, grad in known])
    if math.isfinite(norm):
        return norm
    known = [(name, full_tensor(grad)) for name, grad in known]
    broken = [name for name, grad in known if not bool(torch.isfinite(grad).all())]
    worst = broken[-1] if broken else max(known, key=lambda each: float(each[1].abs().max()))[0]
    layer = scales.get(worst, plain_name(worst.removesuffix(".weight").removesuffix(".bias")))
    what = "NaN or infinite" if broken else "too large for a number"
    raise SqatError(f"the gradient of {layer} is {what} at step {step} ({len(broken)} of {len(known)} tensors)", LOWER)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, those that are shared out between processes and those that are not."""
    kinds = [[each for each in gradients if isinstance(each, DTensor) is shared] for shared in (False, True)]
    norms = [full_tensor(nn.utils.get_total_norm(some)) for some in kinds if some]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def learned_bounds(model: nn.Module) -> dict[str, Tensor]:
    """Learned bounds of the activation sites by name."""
    found = dict(model.named_children()).get(QUANTIZERS)
    if not isinstance(found, Quantizers) or not found.learned:
        return {}
    return dict(zip(found.index, found.values, strict=True))


def check_scales(bounds: Mapping[str, Tensor], start: Mapping[str, float], step: int) -> None:
    """Refuse a learned bound that is no number, or far beyond what calibration found."""
    if not bounds:
        return
    now = torch.stack([bound.detach() for bound in bounds.values()]).tolist()
    for site, value in zip(bounds, now, strict=True):
        if not value <= EXPLODED * start[site]:
            raise SqatError(f"the scale of {site} has run away: its bound was {start[site]:.3g} and is {value:.3g} at "
                            f"step {step}", "lower learning_rate, or set activation_scales: fixed")  # fmt: skip


@torch.no_grad()
def weak_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Layers whose weights are all zero, and layers with rows that are, of linears and convolutions."""
    dead, rows = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kept = module.weight.flatten(1).any(dim=1)
            if not bool(kept.any()):
                dead.append(name)
            elif not bool(kept.all()):
                rows.append(f"{name} ({int((~kept).sum())} of {len(kept)})")
    return dead, rows


def weakness(model: nn.Module, step: int) -> dict[str, str]:
    """What is weak in a model: kind -> a line."""
    dead, rows = weak_layers(model)
    lines = {}
    if dead:
        lines["dead"] = f"{len(dead)} dead layers at step {step}, all of whose weights are zero: {listed(dead)}"
    if rows:
        lines["rows"] = f"{len(rows)} layers with rows of zeros at step {step}: {listed(rows)}"
    return lines


def saturation(manifest: Manifest) -> list[str]:
    """The activation sites that clip much of what they see, in one line."""
    found = [f"{site} ({record.saturated:.0%})" for site, record in manifest.sites.items()
             if record.saturated is not None and record.saturated > SATURATED]  # fmt: skip
    return [f"{len(found)} saturated sites, which clip what they see: {listed(found)}"] if found else []


def listed(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")
