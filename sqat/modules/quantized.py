"""A model as it will be served: masks and fake quantizers in, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_, remove_quantizers_
from sqat.modules.parametrize import insert_weights_, remove_weights_


@contextmanager
def quantized_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layers: Iterable[str],
    quantizers: Quantizers,
    blocks: list[str],
) -> Iterator[None]:
    """Put masks and fake quantizers on ``model``; afterwards its weights are plain again, pruned ones +0.0.

    Where that fails, ``model`` is as it was.

    Args:
        layers: linears whose weights are quantized.
        quantizers: of the activation sites.
        blocks: names of the encoder blocks.
    """
    with ExitStack() as inserted:
        inserted.callback(remove_quantizers_, model, insert_quantizers_(model, quantizers, blocks))
        inserted.callback(remove_weights_, model, insert_weights_(model, masks, layers))  # last: a mask leaves zeros
        yield
