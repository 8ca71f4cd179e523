"""The QAT stage: masks, fake quantization and MiniLM distillation together in every step."""

from __future__ import annotations

from sqat.checkpoint.store import Checkpoint, quantized_layers
from sqat.errors import SqatError
from sqat.evaluation.evaluate import quantize_as_calibrated
from sqat.models.loading import serialize_model
from sqat.modules.batch_norm import round_conv_biases_
from sqat.recipe.stages import QatConfig
from sqat.stages.context import StageContext


def run(config: QatConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Train the calibrated parent with its masks and quantizers in place."""
    if parent is None or not parent.amax:
        problem = f"stage {context.name} needs activation scales"
        raise SqatError(problem, "put a calibrate stage before it", code="stage-order")
    model, processor = context.load_model(parent)
    learned = config.activation_scales == "learned"
    with (
        quantize_as_calibrated(model, parent, learned) as quantizers,
        context.training_loss(model, config, processor) as loss,
    ):
        result = context.fit(model, processor, loss, config)
        round_conv_biases_(model, quantized_layers(parent), quantizers.amax(), quantizers.shared_with, parent.masks)
        metrics = {"dev": context.measure(model, processor, "dev")}
    files, weights = serialize_model(model, processor)
    sites = parent.manifest.sites
    if learned:  # the share that calibration clipped does not hold for an amax that moved
        sites = {site: record.model_copy(update={"saturated": None}) for site, record in sites.items()}
    manifest = context.manifest(config, parent, result, metrics=metrics, sites=sites)
    return Checkpoint(manifest, files, weights, parent.masks, quantizers.amax())
