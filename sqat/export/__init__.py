"""ONNX export: the float graph, the Q/DQ writer and its flavours, folders for other runtimes, ONNX Runtime."""
