"""Reading, checking and writing ONNX files of any size; every file from outside comes in by `read`."""
