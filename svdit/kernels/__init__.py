"""Number formats and the arithmetic of quantized layers."""
