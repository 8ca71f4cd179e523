"""Int8 quantization: histograms, calibrators and fake quantization on tensors."""
