"""ONNX export: the float graph, the Q/DQ writer, the checks of the result, the runtime that proves parity."""
