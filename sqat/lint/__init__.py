"""The rules of each target for any ONNX graph, and repairs that keep the numbers."""
