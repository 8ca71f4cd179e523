"""Distillation losses on tensors."""
