"""Quantized models as they run fastest."""
