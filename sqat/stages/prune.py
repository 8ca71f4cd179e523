"""Progressive N:M pruning: a growing mask over the surviving weights, fine-tuning between (source: NVIDIA/Tencent).

The mask of step i is set before one training step and holds in every forward pass after it; the last one
is set when ``recover`` of the steps remain. One-shot pruning is the schedule with one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from sqat.checkpoint import Checkpoint, LayerRecord
from sqat.errors import SqatError
from sqat.insertion.weights import WeightTransform, insert_weights_, layer, original_weight, remove_weights_
from sqat.job import Job
from sqat.layers import choose_layers
from sqat.models import capture
from sqat.recipe import PruneConfig
from sqat.sparsity.masks import parse_pattern
from sqat.stages.losses import stage_loss


def run(config: PruneConfig, parent: Checkpoint | None, job: Job) -> Checkpoint:
    """Prune the chosen layers step by step, fine-tuning on the task (and distilling, by choice)."""
    if parent is not None and parent.amax:
        raise SqatError(f"stage {job.name} would undo the scales of {parent.manifest.stage}",
                        "prune before calibrating")  # fmt: skip
    model, processor = job.start(parent)
    choice = choose_layers(model, config.layers, "prune", parse_pattern(config.pattern).m)
    old = {} if parent is None else parent.masks
    masks = {name: old.get(name, torch.ones_like(layer(model, name).weight, dtype=torch.bool)).clone()
             for name in choice.chosen}  # fmt: skip
    kept = {name: mask for name, mask in old.items() if name not in masks}
    transforms = insert_weights_(model, {**masks, **kept}, ())
    moments = mask_steps(config, job.steps(config, job.feed(config, processor)))
    before_step = masking(model, {name: transforms[name] for name in masks}, config, moments)
    with stage_loss(model, config.distill, job) as loss:
        fitted = job.fit(model, processor, loss, config, before_step, judge_from=max(moments))
    masks = {name: mask.cpu() for name, mask in remove_weights_(model, transforms).items()}
    metrics = {"dev": job.measure(model, processor, "dev")}
    layers = {name: LayerRecord(pattern=config.pattern) for name in choice.chosen}
    layers |= {name: LayerRecord(dense_because=reason) for name, reason in choice.left.items()}
    if parent is not None:
        layers |= {name: parent.manifest.layers[name] for name in kept}
    files, weights = capture(model, processor)
    manifest = job.manifest(config, parent, fitted, metrics=metrics, layers=layers)
    return Checkpoint(manifest, files, weights, masks)


def mask_steps(config: PruneConfig, steps: int) -> dict[int, float]:
    """Training step -> sparsity from that step on: evenly spaced, the last when ``recover`` of the steps remain."""
    sparsities = config.schedule.sparsities(parse_pattern(config.pattern))
    last = min(steps - 1, round((1 - config.recover) * steps)) if len(sparsities) > 1 else 0
    return {round(i * last / max(1, len(sparsities) - 1)): sparsity for i, sparsity in enumerate(sparsities)}


def masking(
    model: nn.Module,
    transforms: Mapping[str, WeightTransform],
    config: PruneConfig,
    moments: Mapping[int, float],
) -> Callable[[int], None]:
    """Set the masks at the schedule's steps; a weight that several layers share is scored once."""
    pattern = parse_pattern(config.pattern)

    def before_step(step: int) -> None:
        if step not in moments:
            return
        done: dict[int, torch.Tensor] = {}
        for name, transform in transforms.items():
            weight = original_weight(layer(model, name))
            if id(weight) not in done:
                scores = config.criterion(weight.detach())
                done[id(weight)] = config.schedule(scores, pattern, moments[step], transform.mask)
            assert transform.mask is not None  # every transform here was made with a mask
            transform.mask.copy_(done[id(weight)])

    return before_step
