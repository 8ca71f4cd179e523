"""What the kernels of target `cpu-sparse` compute, in torch and bit for bit, while a model is in eval mode.

What: linears multiply integers, layer norms add up in the kernels' order, attention takes the kernels' exp, and GELU
is their polynomial (`sqat.modules.gelu`). Why: rounded to int8, a value whose last bit differs falls on another
step now and then, later layers multiply such steps, and a ranking of a small dev split moves by some tenths of a point:
what is measured here would not be what is served. In training mode nothing is replaced: there the difference means
nothing, and gradients need the plain operations.

How: each module's ``forward`` is another one for as long as it is inserted. The order of every operation is that of
``sqat/runtime/source``; a test compares the two. Left out: what surrounds the layers (pooling, heads), which the
runtime computes in floats in its own way, and word embeddings in int8, which are no part of training.

Shapes: B batch, h heads, T queries, S keys, d head width, H channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.errors import SqatError
from sqat.modules.hooks import Taps
from sqat.modules.parametrize import original_weight
from sqat.quantization.fake_quant import HIGH, quantize_weight
from sqat.sparsity.masks import apply_mask

ATTENTION_STEP = "sqat_attention_step"
LANES = 16  # partial sums of a row
EXACT = 2**24  # up to here every integer is a float32
LARGEST_BYTE = 255
# 255 * 2^x for x from -1/2 to 1/2, lowest power first
POWER = (255.0, 176.752479, 61.2567173, 14.154371, 2.46623577, 0.338250544)
LOG2_E = 1.44269504
LOWEST_POWER = -40.0
Step = Callable[[str], Tensor]  # site -> its step, 0-d


def serve_as_kernels(model: nn.Module, sites: Collection[str], step: Step, blocks: Iterable[str], taps: Taps) -> None:
    """Let linears with an input among the sites, attention with a query among them, and the layer norms of the blocks
    and of the embeddings compute as the kernels do, until the taps are removed.

    Raises:
        SqatError: the model is not float32, as the kernels are.
    """
    check_float32(model)
    within = tuple(f"{block}." for block in blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}:input" in sites:
            replace_forward(module, partial(multiply_as_served, partial(step, f"{name}:input")), taps)
        elif isinstance(module, nn.LayerNorm) and (name.startswith(within) or name.endswith("embeddings.LayerNorm")):
            replace_forward(module, normalize_as_served, taps)
        elif f"{name}:query" in sites:
            taps.put(module, ATTENTION_STEP, partial(step_of, step, name))


def check_float32(model: nn.Module) -> None:
    """Refuse weights of another type, whose sums would be rounded elsewhere."""
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise SqatError(
                f"placement cpu computes in float32, and {name} is {weight.dtype}", "call model.float() before"
            )


def step_of(step: Step, attention: str, role: str) -> Tensor:
    """The step of an attention's operand."""
    return step(f"{attention}:{role}")


def replace_forward(module: nn.Module, served: Callable[[Any, Tensor], Tensor], taps: Taps) -> None:
    """Put ``served(module, x)`` in the place of a module's forward in eval mode."""
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = own(x) if module.training else served(module, x)
        return y

    taps.put(module, "forward", forward)


def multiply_as_served(input_step: Callable[[], Tensor], module: nn.Linear, x: Tensor) -> Tensor:
    """A linear [..., in] -> [..., out] of a quantized input: an exact sum of integers * scale + bias.

    Args:
        x: multiples of the step, at most 127.
    """
    step = input_step()
    integers, scale = quantize_weight(masked_weight(module))
    sums = exact_product(to_integers(x, step), integers.float().t())
    y = sums * (scale * step)
    return y if module.bias is None else y + module.bias


def masked_weight(module: nn.Linear) -> Tensor:
    """The weight before it is quantized, pruned entries 0."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    transforms: Any = module.parametrizations
    mask: Tensor | None = transforms.weight[0].mask
    weight = original_weight(module)
    return weight if mask is None else apply_mask(weight, mask)


def to_integers(x: Tensor, step: Tensor) -> Tensor:
    """The whole numbers of multiples of a step, as floats."""
    return (x.float() * (1 / step)).round()


def exact_product(left: Tensor, right: Tensor, largest: int = HIGH * HIGH) -> Tensor:
    """The product [..., M,N] of whole numbers [..., M,K] and [..., K,N], each sum rounded to float32 once.

    Args:
        largest: of a product of two entries.
    """
    most = EXACT // largest
    with torch.autocast(left.device.type, enabled=False):  # a narrower type would not hold the sums
        if left.shape[-1] <= most:
            return left @ right
        parts = zip(left.split(most, -1), right.split(most, -2), strict=True)
        return torch.stack([(a @ b).int() for a, b in parts]).sum(0).float()  # int64: some devices have no float64


def normalize_as_served(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm over the last dimension."""
    channels = x.shape[-1]
    centred = x - row_sums(x) / channels
    variance = row_sums(centred * centred) / channels + module.eps
    deviation = 1 / nearest_root(variance)
    y: Tensor = centred * deviation * module.weight + module.bias
    return y


def nearest_root(x: Tensor) -> Tensor:
    """The float32 nearest to a square root, which torch's own is not always; on the CPU where float64 is missing."""
    wide = x.cpu() if x.device.type == "mps" else x
    return wide.double().sqrt().float().to(x.device)


def row_sums(x: Tensor) -> Tensor:
    """Sums [..., 1] of rows [..., H]: channel c into part c % 16 one after the other, the parts by a tree."""
    lanes = nn.functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    sums: Tensor = lanes[..., 0, :]
    for part in lanes.unbind(-2)[1:]:
        sums = sums + part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums


def attend_as_served(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, step: Step
) -> tuple[Tensor, Tensor]:
    """Attention [B,T,h,d] and probabilities [B,h,T,S]; a query without any key gets zeros.

    Args:
        query: [B,h,T,d], like key and value [B,h,S,d] multiples of their steps.
        step: of ``query``, ``key`` and ``value``.
    """
    steps = [step(role) for role in ("query", "key", "value")]
    queries, keys, values = (to_integers(x, s) for x, s in zip((query, key, value), steps, strict=True))
    scores = exact_product(queries, keys.transpose(2, 3))
    kept = torch.ones_like(scores, dtype=torch.bool) if attention_mask is None else ~left_out(attention_mask)
    scores = scores.masked_fill(~kept, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    scale = torch.tensor(float(steps[0]) * float(steps[1]) * scaling)  # rounded once, as an attribute is
    bytes_ = power_of_two((scores - largest).masked_fill(~kept, 0.0) * (scale * LOG2_E)).round()
    bytes_ = bytes_.masked_fill(~kept, 0.0)
    total = bytes_.sum(-1, keepdim=True).clamp(min=1)
    output = exact_product(bytes_, values, LARGEST_BYTE * HIGH) / total * steps[2]
    return output.transpose(1, 2).contiguous(), bytes_ / total


def left_out(attention_mask: Tensor) -> Tensor:
    """Where a mask that is added to scores leaves a key out: far below 0, for its type."""
    return attention_mask <= torch.finfo(attention_mask.dtype).min / 2


def power_of_two(x: Tensor) -> Tensor:
    """255 * 2^x of x <= 0, by a polynomial between whole powers."""
    inside = x.clamp(min=LOWEST_POWER)
    whole = inside.round()
    rest = inside - whole
    square = rest * rest
    low = (rest * POWER[1] + POWER[0]) + (rest * POWER[3] + POWER[2]) * square
    total = low + (rest * POWER[5] + POWER[4]) * (square * square)
    powers = torch.tensor([2.0**-n for n in range(1 - int(LOWEST_POWER))], device=x.device)
    return total * powers[(-whole).long()]
