"""sqat: sparse quantization-aware training of transformers, from one recipe to an int8 2:4 ONNX file."""

__version__ = "0.1.0"
