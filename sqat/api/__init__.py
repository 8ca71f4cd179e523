"""The same things for a training loop of one's own: masks, scales, MiniLM and ONNX files, without a recipe.

Its public names are those of `sqat` itself (``sqat.prune``), imported when they are first asked for. Nothing is done
anew: criteria, schedules, calibrators, losses, insertion and exporter are those of the stages. What a recipe names
from a closed list (so that a checkpoint can say how it was made) may here be any callable: criterion, calibrator, loss.

Models are transformers encoders in the user's hands: each change is undone on leaving its ``with`` block. Left out:
checkpoints with their records, learned activation scales, schedule sr-ste, calibration of networks of convolutions
(a recipe folds their batch norms), targets other than three ONNX files, proofs on a dev split; recipes have them all.
"""
