"""The parts of a recipe for a training loop of your own: masks, scales, MiniLM, ONNX files, a Trainer callback.

Its public names are those of `sqat` itself (``sqat.prune``). Any callable may be a criterion, a calibrator or a loss.
Each change of a model is undone when its ``with`` block ends.
"""
