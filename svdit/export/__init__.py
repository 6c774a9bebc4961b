"""A DiT, quantized or not, in formats that need no svdit."""
